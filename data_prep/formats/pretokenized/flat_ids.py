"""Files of ids alone, as nanoGPT, llm.c and build-nanogpt write them.

An end-of-document id stands after each document (nanoGPT) or before it (llm.c, build-nanogpt).

A `.npy` file, and llm.c's two headers, say how wide their ids are. A bare file does not: it is read
as uint16, and what looks like ids of another width, at any place of it, is refused (`id_width`).
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.errors import UserError, explained
from data_prep.formats.first_bytes import FIRST_BYTES, KINDS_THAT_ARE_NO_IDS, FirstBytes
from data_prep.formats.flat_arrays import Offsets
from data_prep.formats.pretokenized.id_width import (
    WRITE_UINT16,
    AnyIds,
    refuse_other_width,
    refuse_other_width_anywhere,
)
from data_prep.inputs.sources import InputFile

SEARCH_TOKENS = 64 << 10
NUMPY_MAGIC = b"\x93NUMPY"
# 256 of int32: magic, version, number of ids, nothing; from llm.c's dev/data/data_common.py
LLM_C_HEADER_BYTES = 1024
LLM_C_BEGINNING = struct.Struct("<3i")
LLM_C_IDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by magic and version
LLM_C_MAGICS = {magic for magic, _ in LLM_C_IDS}
OTHER_TOKENIZER = "was it made with another tokenizer than the mixture's?"

LOOKED_AT_IDS = 16 << 10  # at each place of a file
LOOKED_AT_PLACES = 9  # of a file, evenly spread, its beginning, middle and end among them
LOOKED_AT_FILES = 32  # of a source, evenly spread


class Layout(NamedTuple):
    """Where the ids of a file lie. Positions count ids from `data_byte` on."""

    dtype: np.dtype[Any]
    stop: int
    expected: str  # what the file must be made of, in words
    data_byte: int = 0
    start: int = 0
    is_bare: bool = False  # no header tells the width
    is_eos_first: bool = False  # its writer puts the end-of-document id before a document


class FlatIds:
    """One such file. Positions count ids."""

    def __init__(self, file: InputFile, eos_id: int) -> None:
        """Raises UserError if the file is not what it is read as.

        Its size may not be what its header says, its ids may look wider than they are read, and
        there may be no document that ends in it.
        """
        self.path = file.url
        self.eos_id = eos_id
        layout = layout_of(file)
        self.dtype = layout.dtype
        self.data_byte = layout.data_byte
        self.start = layout.start
        self.stop = layout.stop
        self.is_bare = layout.is_bare
        if file.size != self.byte(self.stop):
            raise UserError(
                f"{file.url}: {file.size:,} bytes, expected {layout.expected}; check the format, "
                "or copy it again"
            )
        if self.is_bare:
            for ids in self.places():
                refuse_other_width(ids, self.path)
        self._find_first_document(layout.is_eos_first)

    @property
    def itemsize(self) -> int:
        """Bytes of an id."""
        return self.dtype.itemsize

    def byte(self, position: int) -> int:
        """Where an id lies."""
        return self.data_byte + self.itemsize * position

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """Behind the first end-of-document id after start that ends at this byte or later.

        Or stop, if there is none before.
        """
        position = (byte - self.data_byte) // self.itemsize
        for begin in range(max(start, position - 1), stop, SEARCH_TOKENS):
            end = min(begin + SEARCH_TOKENS, stop)
            is_eos = self._ids(begin, end) == self.eos_id
            if is_eos.any():
                return begin + int(is_eos.argmax()) + 1
        return stop

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids from start to stop, and where documents begin in them."""
        ids = self._ids(start, stop)
        if self.is_bare:
            refuse_other_width_anywhere(ids, self.path, self.byte(start))
        ends = np.flatnonzero(ids == self.eos_id) + 1
        bounds = np.concatenate(([0], ends, [len(ids)]))
        return ids, np.unique(bounds)

    def places(self) -> list[AnyIds]:
        """Ids at places evenly spread over the file, its beginning, middle and end among them."""
        last = max(self.start, self.stop - LOOKED_AT_IDS)
        whole = last - self.start
        steps = LOOKED_AT_PLACES - 1
        begins = sorted({self.start + whole * step // steps for step in range(steps + 1)})
        places = []
        for begin in begins:
            stop = min(begin + LOOKED_AT_IDS, self.stop)
            places.append(self._ids(begin, stop))
        return places

    def _ids(self, start: int, stop: int) -> AnyIds:
        count = stop - start
        return np.fromfile(self.path, self.dtype, count, offset=self.byte(start))

    def _find_first_document(self, is_eos_first: bool) -> None:
        """Pass over the first end-of-document id where documents come after theirs."""
        end = self.next_cut(self.start, self.stop, 0)
        if not self._is_eos(end - 1):
            problem = f"eos_id {self.eos_id} never occurs, so where documents end is not known"
            raise UserError(f"{self.path}: {problem}; {OTHER_TOKENIZER}")
        begins_so = self._is_eos(self.start)
        ends_so = self._is_eos(self.stop - 1)
        # Both: nanoGPT's, whose first document is empty.
        if begins_so and (is_eos_first or not ends_so):
            self.start += 1

    def _is_eos(self, position: int) -> bool:
        """Whether there is an end-of-document id; there is none before the file or behind it."""
        if position < 0:
            return False
        return self.eos_id in self._ids(position, position + 1)


def layout_of(file: InputFile) -> Layout:
    """What a file's header says, or its lack of one."""
    with open(file.url, "rb") as stream:
        first = stream.read(FIRST_BYTES)
    FirstBytes(format="uint16", kinds=KINDS_THAT_ARE_NO_IDS).check(file, first)
    if first.startswith(NUMPY_MAGIC):
        return _numpy_layout(file)
    beginning = first[: LLM_C_BEGINNING.size].ljust(LLM_C_BEGINNING.size, b"\0")
    magic, version, ids = LLM_C_BEGINNING.unpack(beginning)
    if magic in LLM_C_MAGICS:
        if (magic, version) not in LLM_C_IDS:
            raise UserError(
                f"{file.url}: llm.c's header {magic} of version {version}, not known; "
                f"{WRITE_UINT16}"
            )
        dtype = np.dtype(LLM_C_IDS[magic, version])
        start = LLM_C_HEADER_BYTES // dtype.itemsize  # the header counts as ids, too
        return Layout(
            dtype=dtype,
            start=start,
            stop=start + ids,
            expected=f"a header of {LLM_C_HEADER_BYTES:,} and {ids:,} ids of {dtype.itemsize}",
            is_eos_first=True,
        )
    if file.url.endswith(".npy"):
        advice = "if dolma wrote it, set format: olmo; if it holds ids alone, name it .bin"
        raise UserError(f"{file.url}: named .npy, without NumPy's header; {advice}")
    return Layout(
        dtype=np.dtype("<u2"),
        stop=file.size // 2,
        expected="ids of 2",
        is_bare=True,
    )


def _numpy_layout(file: InputFile) -> Layout:
    """What a `.npy` file's header says.

    Raises UserError for anything but integers in one dimension.
    """
    npy = np.lib.format
    with (
        explained(Exception, f"{file.url}: damaged, no NumPy header", "write it again"),
        open(file.url, "rb") as stream,
    ):
        if npy.read_magic(stream) == (1, 0):
            shape, _, dtype = npy.read_array_header_1_0(stream)
        else:
            shape, _, dtype = npy.read_array_header_2_0(stream)
        data_byte = stream.tell()
    if dtype.kind not in "iu":
        raise UserError(
            f"{file.url}: numbers of type {dtype}, expected integers; write ids as uint16"
        )
    if len(shape) != 1:
        raise UserError(
            f"{file.url}: of shape {shape}, expected one dimension; write documents one after "
            "another"
        )
    (ids,) = shape
    return Layout(
        dtype=dtype,
        stop=ids,
        expected=f"a header of {data_byte} and {ids:,} ids of {dtype.itemsize}",
        data_byte=data_byte,
    )


def check_lengths(files: Sequence[InputFile], eos_id: int, where: str) -> None:
    """Raises UserError for a source most of whose documents have one token or none.

    Looked at are some places of some files, `eos_id` being what ends documents.
    """
    numbers = {len(files) * number // LOOKED_AT_FILES for number in range(LOOKED_AT_FILES)}
    short = 0
    documents = 0
    for number in sorted(numbers):
        for ids in FlatIds(files[number], eos_id).places():
            ends = np.flatnonzero(ids == eos_id)
            lengths = np.diff(ends) - 1  # of the documents that lie there whole
            short += int(np.count_nonzero(lengths <= 1))
            documents += len(lengths)
    if short > documents / 2:
        problem = f"{short:,} of {documents:,} documents looked at have one token or none"
        advice = (
            f"see that eos_id {eos_id} ends documents, pads none, and that ids are 2 bytes wide, "
            "or write them anew"
        )
        raise UserError(f"{where}: {problem}; {advice}")
