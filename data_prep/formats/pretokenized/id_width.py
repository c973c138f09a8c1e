"""Whether ids that are read as 2 bytes wide are wider ones, by what they look like.

Then every second number is the upper half of an id: 0, or small. Ids of 2 bytes are never so for
long.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError

AnyIds = npt.NDArray[Any]

WRITE_UINT16 = "write them as uint16, or as a .npy file, whose header tells the width"
WINDOW_IDS = 64 << 10  # all that is read is looked at in pieces of so many
LEAST_IDS = 1024  # of such a piece: fewer may look like anything
# of a file: fewer say nothing
LEAST_PAIRS = 2
# so many say it though some ids be above 65,535
CERTAIN_PAIRS = 16
# in a row: any run of 1,023 ids or more of 2 bytes holds so many that begin at a multiple
PAIRS_OF_A_RUN = 256
LEAST_DIFFERENT = 8  # ids among them: "!?!?" of a text repeats the same few
SMALL_ID = 3  # the upper half of an id of 4 bytes is no more, of a vocabulary up to 262,144
# shares of small ids, in every second place and in the others
MANY = 0.99
FEW = 0.9
LOWER_HALF = 0xFFFF


def refuse_other_width(ids: AnyIds, path: str) -> None:
    """Raises UserError if every second uint16 is as the upper half of a wider id, whichever half
    comes first.
    """
    seconds = ids[1::2]
    firsts = ids[0::2][: len(seconds)]
    if len(seconds) < LEAST_PAIRS:
        return
    if len(seconds) < CERTAIN_PAIRS:  # so few may be small by chance
        looks_wider = bool(firsts.any()) != bool(seconds.any())
    else:
        small_firsts = _share_of_small(firsts)
        small_seconds = _share_of_small(seconds)
        fewer = min(small_firsts, small_seconds)
        more = max(small_firsts, small_seconds)
        looks_wider = fewer < FEW and more >= MANY
    if looks_wider:
        problem = f"every second id is at most {SMALL_ID}, as in ids of 4 or 8 bytes"
        raise UserError(f"{path}: {problem}; {WRITE_UINT16}")


def _share_of_small(ids: AnyIds) -> float:
    return int(np.count_nonzero(ids <= SMALL_ID)) / len(ids)


def refuse_other_width_anywhere(ids: AnyIds, path: str, first_byte: int) -> None:
    """Raises UserError if ids that were read hold wider ones, all of them or a run within them.

    `first_byte` is where `ids` lies in the file.
    """
    refuse_runs_of_other_width(ids, path, first_byte)
    for start in range(0, len(ids) - WINDOW_IDS + 1, WINDOW_IDS):
        refuse_other_width(ids[start : start + WINDOW_IDS], path)
    # what is left, with what is before it
    last = ids[-WINDOW_IDS:]
    if len(last) >= LEAST_IDS:
        refuse_other_width(last, path)


def refuse_runs_of_other_width(ids: AnyIds, path: str, first_byte: int) -> None:
    """Raises UserError, naming the byte, where every second uint16 of a run is 0 and those between
    are ids.

    So lie ids of 4 or 8 bytes within a file of 2, wherever they begin; `first_byte` is where `ids`
    lies in the file.
    """
    run_ids = 2 * PAIRS_OF_A_RUN
    last = len(ids) - run_ids
    if last < 0:
        return
    whole = len(ids) // run_ids * run_ids
    for begin, part in ((0, ids[:whole]), (last, ids[last:])):
        # shape (runs, pairs), each pair as one number: the first is the lower half
        pairs = part.view("<u4").reshape(-1, PAIRS_OF_A_RUN)
        for number in _wide_runs(pairs):
            at = first_byte + 2 * (begin + number * run_ids)
            problem = f"at byte {at:,} every second id of {run_ids} is 0, as in ids of 4 or 8 bytes"
            raise UserError(f"{path}: {problem}; {WRITE_UINT16}")


def _wide_runs(pairs: npt.NDArray[np.uint32]) -> list[int]:
    """The runs, shape (runs, pairs), of whose pairs one half is 0 throughout and the other not."""
    # two pairs of each run first: to look at all takes a sixth of the time of reading
    some = pairs[:, 0] | pairs[:, PAIRS_OF_A_RUN // 2]
    suspects = np.flatnonzero((some & LOWER_HALF == 0) | (some >> 16 == 0))
    # bits of all its firsts, and of all its seconds
    seen = np.bitwise_or.reduce(pairs[suspects], axis=1)
    is_wide = (seen & LOWER_HALF == 0) != (seen >> 16 == 0)
    numbers: list[int] = suspects[is_wide].tolist()
    return [number for number in numbers if len(np.unique(pairs[number])) >= LEAST_DIFFERENT]
