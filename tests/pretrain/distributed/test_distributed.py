"""Who a process is, from the launcher's variables alone, and ranks that wait for others in vain."""

import sys
from pathlib import Path

import pytest
from support.runs import run_command, write_recipe

from data_prep.errors import UserError
from pretrain.distributed.addresses import own_address
from pretrain.distributed.rendezvous import free_port
from pretrain.distributed.world import world_from_environment

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
def test_a_rank_that_waits_for_the_others_in_vain_says_so_in_one_line_and_is_no_bad_input(
    rank: str, tiny_data: Path, tmp_path: Path
) -> None:
    who = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DEEPSPEED_TIMEOUT": "0",
    }
    recipe, run_dir = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    flags = ["--recipe", str(recipe), "--data-dir", str(tiny_data), "--run-dir", str(run_dir)]
    result = run_command(sys.executable, "-m", "pretrain.train", *flags, **who, **meeting)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank {rank} (")
    assert "another rank failed before all had met" in line
    assert "Traceback" not in result.stderr


ATTENTION_IN_BF16 = """
import torch
x = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_that_cannot_attend_in_bf16_on_this_cpu_are_refused_in_one_line(
    capability: str, tiny_data: Path, tmp_path: Path
) -> None:
    """On a processor with AMX torch raises; on any other the same run is fine."""
    torch_alone = run_command(
        sys.executable, "-c", ATTENTION_IN_BF16, ATEN_CPU_CAPABILITY=capability
    )
    flags = [
        "--recipe",
        str(write_recipe(tmp_path / "recipe.yaml")),
        "--data-dir",
        str(tiny_data),
        "--dry-run",
    ]
    command = [sys.executable, "-m", "pretrain.train", *flags, "--run-dir", str(tmp_path / "run")]
    result = run_command(*command, "--engine=zero2_bf16", ATEN_CPU_CAPABILITY=capability)
    if torch_alone.returncode == 0:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 2
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert line.startswith(
            f"error: ATEN_CPU_CAPABILITY={capability}: bf16 attention fails with it on this CPU"
        )
        assert "unset it, or train in fp32 (--deepspeed-config zero2_fp32)" in line
    in_fp32 = run_command(*command, ATEN_CPU_CAPABILITY=capability)
    assert in_fp32.returncode == 0, in_fp32.stderr
