"""A safetensors file written tensor by tensor, none of which need ever be whole in memory.

Byte for byte as `safetensors.torch.save_file` writes the same tensors
(https://github.com/huggingface/safetensors: an 8-byte length, a JSON header, data), which wants all
of them at once.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import naming

BLOCK_NUMBERS = 4 << 20
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
ALIGNMENT = 8  # bytes, at a multiple of which the data begin


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that lies somewhere else than in memory."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]  # all its numbers in order, some millions at a time


def blocks_of(tensor: Tensor | StoredTensor) -> Iterator[Tensor]:
    """The numbers of a tensor in order, some millions at a time, each a vector."""
    if isinstance(tensor, StoredTensor):
        yield from tensor.blocks()
    else:
        yield from tensor.reshape(-1).split(BLOCK_NUMBERS)


def header_of(tensors: Mapping[str, Tensor | StoredTensor], dtype: torch.dtype) -> bytes:
    """The beginning of a file that holds tensors, all of one dtype, in order of their names."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin = end
        end += math.prod(tensors[name].shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | StoredTensor], dtype: torch.dtype
) -> None:
    """Write tensors, converted to fp32 or bfloat16, and flush them to the disk.

    Raises OSError, naming the file.
    """
    with naming(path), path.open("wb") as file:
        file.write(header_of(tensors, dtype))
        for name in sorted(tensors):
            for block in blocks_of(tensors[name]):
                file.write(block.to(dtype).contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
