"""Files of ids as other tools write them, and what is read from those."""

import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from data_prep.formats.pretokenized import documents as pretokenized
from data_prep.formats.pretokenized.documents import cut_ids, read_ids
from data_prep.inputs.sources import InputFile

EOS = 5


HUGE = 1 << 40


CODES = {"u1": 1, "<i4": 4, "<i8": 5, "<u2": 8}  # of Megatron's DType


def input_file(path: Path) -> InputFile:
    return InputFile(name=path.name, url=str(path), size=path.stat().st_size, version="")


def write_uint16(path: Path, ids: Sequence[int], header: bytes = b"") -> InputFile:
    path.write_bytes(header + np.array(ids, "<u2").tobytes())
    return input_file(path)


def llm_c_header(tokens: int) -> bytes:
    return np.array([20240520, 1, tokens, *[0] * 253], "<i4").tobytes()


def write_megatron(
    path: Path,
    documents: Sequence[Sequence[Sequence[int]]],
    dtype: str = "<u2",
    *,
    append_eod: bool = False,
) -> InputFile:
    """The two files by the format's definition; a document is a list of sequences."""
    sequences = [
        [*sequence, EOS] if append_eod and i == len(document) - 1 else [*sequence]
        for document in documents
        for i, sequence in enumerate(document)
    ]
    path.write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [
        np.dtype(dtype).itemsize * before
        for before in itertools.accumulate(lengths[:-1], initial=0)
    ]
    bounds = [*itertools.accumulate((len(document) for document in documents), initial=0)]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[dtype], len(lengths), len(bounds))
    parts = (
        np.array(lengths, "<i4"),
        np.array(pointers[: len(lengths)], "<i8"),
        np.array(bounds, "<i8"),
    )
    path.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    return input_file(path)


def read_all(
    file: InputFile, format: str, unit_bytes: int = HUGE, batch_tokens: int = 4 << 20
) -> list[list[int]]:
    """Every document of a file, through units and batches of the sizes given."""
    documents = []
    with mock.patch.object(pretokenized, "BATCH_TOKENS", batch_tokens):
        units = cut_ids(file, format, EOS, unit_bytes)
        for before, after in itertools.pairwise(units):
            assert before[1] == after[0]
        for start, stop, _ in units:
            batches = list(read_ids(file, format, start, stop, EOS))
            for ids, offsets in batches:
                assert (ids.dtype, offsets.dtype, offsets[0], offsets[-1]) == (
                    np.uint32,
                    np.int64,
                    0,
                    len(ids),
                )
                documents += [
                    ids[first:last].tolist() for first, last in itertools.pairwise(offsets)
                ]
    return documents
