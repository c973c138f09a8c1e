"""Who a process is, from the launcher's variables alone, and ranks that wait for others in vain."""

import sys

import pytest
from conftest import run_command

from data_prep.errors import UserError
from pretrain.distributed import free_port, own_address, world_from_environment

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


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_waits_for_the_others_in_vain_says_so_in_one_line_and_is_no_bad_input(rank: str) -> None:
    who = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DEEPSPEED_TIMEOUT": "0"}
    command = ["-m", "pretrain.train", "--recipe", "quickstart", "--data-dir", "none", "--run-dir", "none"]
    result = run_command(sys.executable, *command, **who, **meeting)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank {rank} (")
    assert "another rank failed before all had met" in line
    assert "Traceback" not in result.stderr
