"""Files of ids alone, an end-of-document id after each document (nanoGPT) or before it (llm.c,
build-nanogpt).

Read by `pretokenized`. A `.npy` file, and llm.c's two headers, say how wide their ids are. A bare
file does not: it is read as uint16, and what looks like ids of another width, at any place of it,
is refused.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError, explained
from data_prep.formats.first_bytes import FIRST_BYTES, KINDS_THAT_ARE_NO_IDS, FirstBytes
from data_prep.formats.flat_arrays import Offsets
from data_prep.inputs.sources import InputFile

AnyIds = npt.NDArray[Any]

SEARCH_TOKENS = 64 << 10
NUMPY_MAGIC = b"\x93NUMPY"
LLM_C_HEADER_BYTES = 1024  # 256 of int32: magic, version, number of ids, nothing
# magic and version, from llm.c's dev/data/data_common.py
LLM_C_IDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
LLM_C_MAGICS = {magic for magic, _ in LLM_C_IDS}
WRITE_UINT16 = "write them as uint16, or as a .npy file, whose header tells the width"
OTHER_TOKENIZER = "was it made with another tokenizer than the mixture's?"

LOOKED_AT_IDS = 16 << 10  # at each place of a file
LOOKED_AT_PLACES = 9  # of a file, evenly spread, its beginning, middle and end among them
LOOKED_AT_FILES = 32  # of a source, evenly spread
WINDOW_IDS = 64 << 10  # all that is read is looked at in pieces of so many
LEAST_IDS = 1024  # of such a piece: fewer may look like anything
# of a file: fewer say nothing; so many say it though some ids be above 65,535
LEAST_PAIRS, CERTAIN_PAIRS = 2, 16
# in a row: any run of 1,023 ids or more of 2 bytes holds so many that begin at a multiple
PAIRS_OF_A_RUN = 256
LEAST_DIFFERENT = 8  # ids among them: "!?!?" of a text repeats the same few
SMALL_ID = 3  # the upper half of an id of 4 bytes is no more, of a vocabulary up to 262,144
MANY, FEW = 0.99, 0.9  # shares of small ids, in every second place and in the others


class FlatIds:
    """One such file. Positions count ids."""

    def __init__(self, file: InputFile, eos_id: int) -> None:
        self.path, self.eos_id, self.start = file.url, eos_id, 0
        with open(file.url, "rb") as stream:
            first = stream.read(FIRST_BYTES)
        FirstBytes(format="uint16", kinds=KINDS_THAT_ARE_NO_IDS).check(file, first)
        self.dtype, self.data_byte = np.dtype("<u2"), 0
        self.is_bare, is_eos_first = False, False
        magic, version, told = struct.unpack("<3i", first[:12].ljust(12, b"\0"))
        if first.startswith(NUMPY_MAGIC):
            self.dtype, self.data_byte, told = _numpy_header(file)
            expected = f"a header of {self.data_byte} and {told:,} ids of {self.dtype.itemsize}"
            self.stop = told
        elif magic in LLM_C_MAGICS:
            if (magic, version) not in LLM_C_IDS:
                raise UserError(
                    f"{file.url}: llm.c's header {magic} of version {version}, not known; "
                    f"{WRITE_UINT16}"
                )
            self.dtype, is_eos_first = np.dtype(LLM_C_IDS[magic, version]), True
            self.start = LLM_C_HEADER_BYTES // self.dtype.itemsize
            expected = (
                f"a header of {LLM_C_HEADER_BYTES:,} and {told:,} ids of {self.dtype.itemsize}"
            )
            self.stop = self.start + told
        elif file.url.endswith(".npy"):
            advice = "if dolma wrote it, set format: olmo; if it holds ids alone, name it .bin"
            raise UserError(f"{file.url}: named .npy, without NumPy's header; {advice}")
        else:
            self.is_bare, self.stop, expected = True, file.size // 2, "ids of 2"
        if file.size != self.byte(self.stop):
            raise UserError(
                f"{file.url}: {file.size:,} bytes, expected {expected}; check the format, or copy "
                "it again"
            )
        for ids in self.places() if self.is_bare else ():
            refuse_other_width(ids, self.path)
        self._find_first_document(is_eos_first)

    @property
    def itemsize(self) -> int:
        """Bytes of an id."""
        return self.dtype.itemsize

    def byte(self, position: int) -> int:
        """Where an id lies."""
        return self.data_byte + self.itemsize * position

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """Behind the first end-of-document id after start that ends at this byte or later; or
        stop.
        """
        position = (byte - self.data_byte) // self.itemsize
        for begin in range(max(start, position - 1), stop, SEARCH_TOKENS):
            is_eos = self._ids(begin, min(begin + SEARCH_TOKENS, stop)) == self.eos_id
            if is_eos.any():
                return begin + int(is_eos.argmax()) + 1
        return stop

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids from start to stop, and where documents begin in them."""
        ids = self._ids(start, stop)
        if self.is_bare:
            refuse_runs_of_other_width(ids, self.path, self.byte(start))
            whole = len(ids) // WINDOW_IDS * WINDOW_IDS
            pieces = [*ids[:whole].reshape(-1, WINDOW_IDS), ids[-WINDOW_IDS:]]
            for piece in pieces:
                if len(piece) >= LEAST_IDS:
                    refuse_other_width(piece, self.path)
        ends = np.flatnonzero(ids == self.eos_id) + 1
        return ids, np.unique(np.concatenate(([0], ends, [len(ids)])))

    def places(self) -> list[AnyIds]:
        """Ids at places evenly spread over the file, its beginning, middle and end among them."""
        last = max(self.start, self.stop - LOOKED_AT_IDS)
        begins = sorted(
            {
                self.start + (last - self.start) * i // (LOOKED_AT_PLACES - 1)
                for i in range(LOOKED_AT_PLACES)
            }
        )
        return [self._ids(begin, min(begin + LOOKED_AT_IDS, self.stop)) for begin in begins]

    def _ids(self, start: int, stop: int) -> AnyIds:
        return np.fromfile(self.path, self.dtype, stop - start, offset=self.byte(start))

    def _find_first_document(self, is_eos_first: bool) -> None:
        """Where documents come after their end-of-document ids, the first of these belongs to
        none.
        """
        end = self.next_cut(self.start, self.stop, 0)
        if not end or self.eos_id not in self._ids(end - 1, end):
            problem = f"eos_id {self.eos_id} never occurs, so where documents end is not known"
            raise UserError(f"{self.path}: {problem}; {OTHER_TOKENIZER}")
        begins_so = self.eos_id in self._ids(self.start, self.start + 1)
        ends_so = self.eos_id in self._ids(self.stop - 1, self.stop)
        # both: nanoGPT's, whose first document is empty
        if begins_so and (is_eos_first or not ends_so):
            self.start += 1


def _numpy_header(file: InputFile) -> tuple[np.dtype[Any], int, int]:
    """Type of the ids, byte at which they begin, and their number. UserError if they are no ids
    in one dimension.
    """
    write = np.lib.format
    with (
        explained(Exception, f"{file.url}: damaged, no NumPy header", "write it again"),
        open(file.url, "rb") as stream,
    ):
        version = write.read_magic(stream)
        read_header = (
            write.read_array_header_1_0 if version == (1, 0) else write.read_array_header_2_0
        )
        shape, _, dtype = read_header(stream)
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
    return dtype, data_byte, shape[0]


def refuse_other_width(ids: AnyIds, path: str) -> None:
    """Raises UserError if every second uint16 is as the upper half of a wider id, whichever half
    comes first.
    """
    firsts, seconds = ids[0::2][: len(ids) // 2], ids[1::2]
    if len(seconds) < LEAST_PAIRS:
        return
    if len(seconds) < CERTAIN_PAIRS:  # so few may be small by chance
        looks_wider = bool(firsts.any()) != bool(seconds.any())
    else:
        shares = sorted(
            np.count_nonzero(half <= SMALL_ID) / len(seconds) for half in (firsts, seconds)
        )
        looks_wider = bool(shares[0] < FEW and shares[1] >= MANY)
    if looks_wider:
        problem = f"every second id is at most {SMALL_ID}, as in ids of 4 or 8 bytes"
        raise UserError(f"{path}: {problem}; {WRITE_UINT16}")


def refuse_runs_of_other_width(ids: AnyIds, path: str, first_byte: int) -> None:
    """Raises UserError, naming the byte, where every second uint16 of a run is 0 and those between
    are ids.

    So lie ids of 4 or 8 bytes within a file of 2, wherever they begin; `first_byte` is where `ids`
    lies in the file.
    """
    run = 2 * PAIRS_OF_A_RUN
    last = len(ids) - run
    whole = len(ids) // run * run
    for begin, part in ((0, ids[:whole]), (last, ids[max(last, 0) :])):
        if len(part) < run:
            continue
        pairs = part.view("<u4").reshape(-1, PAIRS_OF_A_RUN)
        # two first: to look at all takes a sixth of reading
        some = pairs[:, 0] | pairs[:, PAIRS_OF_A_RUN // 2]
        suspects = np.flatnonzero((some & 0xFFFF == 0) | (some >> 16 == 0))
        # bits of all its firsts, and of all its seconds
        seen = np.bitwise_or.reduce(pairs[suspects], axis=1)
        is_wide = (seen & 0xFFFF == 0) != (seen >> 16 == 0)
        for number in suspects[is_wide].tolist():
            if len(np.unique(pairs[number])) >= LEAST_DIFFERENT:
                at = first_byte + 2 * (begin + number * run)
                problem = f"at byte {at:,} every second id of {run} is 0, as in ids of 4 or 8 bytes"
                raise UserError(f"{path}: {problem}; {WRITE_UINT16}")


def check_lengths(files: Sequence[InputFile], eos_id: int, where: str) -> None:
    """Raises UserError for a source most of whose documents, at the places looked at, have one
    token or none.
    """
    numbers = sorted({len(files) * i // LOOKED_AT_FILES for i in range(LOOKED_AT_FILES)})
    short = documents = 0
    for file in (files[number] for number in numbers):
        for ids in FlatIds(file, eos_id).places():
            # of the documents that lie there whole
            lengths = np.diff(np.flatnonzero(ids == eos_id)) - 1
            short += int(np.count_nonzero(lengths <= 1))
            documents += len(lengths)
    if short > documents / 2:
        problem = f"{short:,} of {documents:,} documents looked at have one token or none"
        advice = (
            f"see that eos_id {eos_id} ends documents, pads none, and that ids are 2 bytes wide, "
            "or write them anew"
        )
        raise UserError(f"{where}: {problem}; {advice}")
