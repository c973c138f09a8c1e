"""Documents that are token ids already: Megatron's `.bin` with its `.idx`, and files of bare uint16 ids.

Read by `corpus` and `unit_shards`, which decode them with the mixture's tokenizer. In a uint16 file an
end-of-document id follows each document (nanoGPT) or precedes it (llm.c, with its header or without).
"""

import bisect
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.encode import Ids, Offsets
from data_prep.errors import UserError
from data_prep.inputs import InputFile

FORMATS = ("megatron", "uint16")
BATCH_TOKENS = 4 << 20
SEARCH_TOKENS = 64 << 10
MAX_DOCUMENT_BYTES = 128 << 20  # in the file, and more or less: so much fits in memory
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of the ids, sequences, documents + 1
MEGATRON_MAGIC = (b"MMIDIDX\0\0", 1)
MEGATRON_DTYPES = {1: "<u1", 4: "<u4", 5: "<u8", 8: "<u2"}  # unsigned: a negative id becomes one too large
LLM_C_MAGIC = (20240520, 1)
LLM_C_HEADER_TOKENS = 512
OTHER_TOKENIZER = "was it made with another tokenizer than the mixture's?"

AnyIds = npt.NDArray[Any]


def cut_ids(file: InputFile, format: str, eos_id: int, unit_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the units of a file: numbers of documents (megatron), or offsets of ids (uint16)."""
    source = _open(file, format, eos_id)
    return list(_cut(source, source.start, source.stop, unit_bytes))


def read_ids(file: InputFile, format: str, start: int, stop: int, eos_id: int) -> Iterator[tuple[Ids, Offsets]]:
    """A unit's documents in batches: ids without end-of-document ids and offsets (documents + 1)."""
    source = _open(file, format, eos_id)
    for first, last, _ in _cut(source, start, stop, BATCH_TOKENS * source.itemsize):
        ids, offsets = source.read(first, last)
        is_eos = np.append(ids == eos_id, False)
        inside = np.setdiff1d(np.flatnonzero(is_eos), offsets[1:] - 1)
        if len(inside):
            document = first + int(np.searchsorted(offsets, inside[0], "right")) - 1
            raise UserError(f"{file.url}: document {document} (from 0) has eos_id {eos_id} inside; {OTHER_TOKENIZER}")
        ended = is_eos[offsets[1:] - 1] & (np.diff(offsets) > 0)
        if source.itemsize == 8:
            ids = np.minimum(ids, np.uint64(2**32 - 1))  # what is too large stays so
        yield ids[~is_eos[:-1]].astype(np.uint32), offsets - np.append(0, np.cumsum(ended))


class _Megatron:
    """A `.bin` of ids, and an `.idx` that says where its sequences lie and which of them make a document."""

    start = 0

    def __init__(self, file: InputFile) -> None:
        self.path, index_path = file.url, Path(file.url).with_suffix(".idx")
        if not file.url.endswith(".bin") or not index_path.is_file():
            raise UserError(f"{file.url}: expected a .bin with its .idx beside it; name the .bin, and copy both")
        header = np.fromfile(index_path, np.uint8, MEGATRON_HEADER.size).tobytes().ljust(MEGATRON_HEADER.size, b"\0")
        magic, version, dtype_code, sequences, bounds = MEGATRON_HEADER.unpack(header)
        if (magic, version) != MEGATRON_MAGIC:
            raise UserError(f"{index_path}: not an index of Megatron, version 1; set format to what the file is")
        if dtype_code not in MEGATRON_DTYPES:
            raise UserError(f"{index_path}: ids of type {dtype_code}, expected 8, 4, 5 or 1; write them as uint16 (8)")
        self.dtype, self.stop = np.dtype(MEGATRON_DTYPES[dtype_code]), bounds - 1
        self.itemsize = self.dtype.itemsize
        self.damaged = f"{index_path}: truncated, damaged, not of this .bin or not of text alone; write both again"
        parts = np.cumsum([MEGATRON_HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds])
        if bounds < 1 or index_path.stat().st_size != parts[-1]:
            raise UserError(self.damaged)
        _, sizes, pointers, documents = np.split(np.memmap(index_path, np.uint8, "r"), parts[:-1])
        self.sizes, self.pointers, self.documents = sizes.view("<i4"), pointers.view("<i8"), documents.view("<i8")
        self.size = int(self.pointers[-1]) + self.itemsize * int(self.sizes[-1]) if sequences else 0
        if file.size != self.size:
            raise UserError(f"{file.url}: {file.size:,} bytes, its .idx says {self.size:,}; copy or write both again")
        if (self.documents[0], self.documents[-1], self.byte(0)) != (0, sequences, 0):
            raise UserError(self.damaged)

    def byte(self, document: int) -> int:
        """Where a document begins."""
        sequence = int(self.documents[document])
        return int(self.pointers[sequence]) if 0 <= sequence < len(self.pointers) else self.size

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """The first document after start that begins at this byte or later; or stop."""
        return bisect.bisect_left(range(stop), byte, start + 1, stop, key=self.byte)

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids of some documents, and where each begins. Raises UserError if the index contradicts itself."""
        documents = self.documents[start : stop + 1]
        sequences = slice(documents[0], documents[-1])
        bounds = np.append(0, np.cumsum(self.sizes[sequences], dtype=np.int64))
        told = np.append(self.pointers[sequences], self.byte(stop))
        is_sorted = (np.diff(documents) >= 0).all() and (np.diff(bounds) >= 0).all()
        is_whole = len(bounds) - 1 == documents[-1] - documents[0]
        if not is_sorted or not is_whole or not np.array_equal(self.byte(start) + self.itemsize * bounds, told):
            raise UserError(self.damaged)
        return np.fromfile(self.path, self.dtype, bounds[-1], offset=told[0]), bounds[documents - documents[0]]


class _Uint16:
    """Ids and nothing else, apart from llm.c's header."""

    itemsize = 2

    def __init__(self, file: InputFile, eos_id: int) -> None:
        self.path, self.eos_id, self.start, self.stop = file.url, eos_id, 0, file.size // 2
        *magic, told = struct.unpack("<3i", self._ids(0, 6).tobytes().ljust(12, b"\0"))
        if tuple(magic) == LLM_C_MAGIC:
            self.start = LLM_C_HEADER_TOKENS
        if file.size % 2 or (self.start and self.start + told != self.stop):
            expected = f"a header of 1,024 and {told:,} ids of 2" if self.start else "ids of 2"
            raise UserError(f"{file.url}: {file.size:,} bytes, expected {expected}; check the format, or copy it again")
        pairs = self._ids(self.start, min(self.stop, self.start + SEARCH_TOKENS))
        if len(pairs) >= 64 and pairs[::2].any() and not pairs[1::2].any():
            raise UserError(f"{file.url}: every second id is 0, as in ids of 4 bytes; write them as uint16")
        end = self.next_cut(self.start, self.stop, 0)
        if not end or eos_id not in self._ids(end - 1, end):
            problem = f"eos_id {eos_id} never occurs, so where documents end is not known"
            raise UserError(f"{file.url}: {problem}; {OTHER_TOKENIZER}")
        self.start += eos_id in self._ids(self.start, self.start + 1)  # documents come after theirs

    def byte(self, position: int) -> int:
        """Where an id lies."""
        return self.itemsize * position

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """Behind the first end-of-document id after start that ends at this byte or later; or stop."""
        for begin in range(max(start, byte // self.itemsize - 1), stop, SEARCH_TOKENS):
            is_eos = self._ids(begin, min(begin + SEARCH_TOKENS, stop)) == self.eos_id
            if is_eos.any():
                return begin + int(is_eos.argmax()) + 1
        return stop

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids from start to stop, and where documents begin in them."""
        ids = self._ids(start, stop)
        return ids, np.unique(np.concatenate(([0], np.flatnonzero(ids == self.eos_id) + 1, [len(ids)])))

    def _ids(self, start: int, stop: int) -> AnyIds:
        return np.fromfile(self.path, "<u2", stop - start, offset=self.itemsize * start)


def _open(file: InputFile, format: str, eos_id: int) -> _Megatron | _Uint16:
    if "://" in file.url:
        raise UserError(f"{file.url}: tokenised data can't be read from there; copy it to a local disk")
    return _Megatron(file) if format == "megatron" else _Uint16(file, eos_id)


def _cut(source: _Megatron | _Uint16, start: int, stop: int, apart_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of whole documents, each up to the document in which apart_bytes come together, and their bytes."""
    while start < stop:
        end = source.next_cut(start, stop, source.byte(start) + apart_bytes)
        size = source.byte(end) - source.byte(start)
        if size > apart_bytes + MAX_DOCUMENT_BYTES:
            problem = f"a document after byte {source.byte(start):,} takes over {MAX_DOCUMENT_BYTES / 1e6:,.0f} MB"
            raise UserError(f"{source.path}: {problem}; cut it into documents")
        yield start, end, size
        start = end
