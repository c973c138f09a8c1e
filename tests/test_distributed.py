"""Who a process is, from the launcher's variables alone."""

import pytest

from data_prep.errors import UserError
from pretrain.distributed import own_address, world_from_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_the_world_is_one() -> None:
    assert world_from_environment().world_size == 1


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_rank_that_cannot_tell_which_one_it_is_does_not_train_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"{name}=2 says that this is one of several ranks"):
        world_from_environment()


def test_own_address_is_an_address() -> None:
    assert len(own_address().split(".")) == 4
