"""Files written tensor by tensor are those that the library writes."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import run_command
from torch import Tensor

from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.safetensors_file import BLOCK_NUMBERS, StoredTensor, write_safetensors


def in_blocks(tensor: Tensor, size: int) -> StoredTensor:
    """A tensor that is given in blocks of a size."""
    return StoredTensor(
        shape=tuple(tensor.shape), blocks=lambda: iter(tensor.reshape(-1).split(size))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_byte_for_byte_the_library_s(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "layers.10.weight": torch.randn(7, 5),
        "layers.9.weight": torch.randn(5, 7).T,
        "a": torch.randn(3),
        "none": torch.empty(0, 4),
        "Über": torch.randn(()),
        "large": torch.randn(2, BLOCK_NUMBERS // 2 + 3),
    }
    expected = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(expected, tmp_path / "library", metadata={"format": "pt"})
    given = {
        "a": in_blocks(tensors["a"], 2),
        "layers.9.weight": in_blocks(tensors["layers.9.weight"], 9),
    }
    write_safetensors(tmp_path / "own", {**tensors, **given}, dtype)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()
    assert load_file(tmp_path / "own").keys() == tensors.keys()


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        write_safetensors(Path("/dev/full"), {"a": torch.ones(BLOCK_NUMBERS)}, torch.float32)
    assert raised.value.filename == "/dev/full"


def test_a_master_read_in_blocks_is_the_whole_one(text_run: Path) -> None:
    checkpoint = load_for_reading(text_run)
    for name in checkpoint.shapes:
        stored = checkpoint.stored(name)
        assert list(stored.shape) == checkpoint.shapes[name]
        whole = torch.cat(list(stored.blocks())).view(stored.shape)
        assert torch.equal(whole, checkpoint.parameter(name))


def test_an_export_takes_the_memory_of_its_largest_parameter_as_the_benchmark_measures() -> None:
    result = run_command(sys.executable, "tests/benchmarks/export_speed.py", "--quick")
    assert result.returncode == 0, result.stderr
    row = re.search(r"\| `tablefree` \| [\d.]+ \(.*?\) \| (\d+) MB \| (\d+) MB \|", result.stdout)
    assert row, result.stdout
    weights_mb = 92  # of which the largest parameter has 17
    assert int(row[1]) < weights_mb * 2 / 3
    assert int(row[2]) == 219  # what a large one may take
