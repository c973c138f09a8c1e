"""Whether ids that are read as 2 bytes wide are wider ones, by what they look like.

Then every second number is the upper half of an id: 0, or small. Ids of 2 bytes are never so for
long.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError

AnyIds = npt.NDArray[Any]
Pairs = npt.NDArray[np.uint32]  # of ids of 2 bytes, each pair as one number

WRITE_UINT16 = "write them as uint16, or as a .npy file, whose header tells the width"
WINDOW_IDS = 64 << 10  # all that is read is looked at in pieces of so many
LEAST_IDS = 1024  # of such a piece: fewer may look like anything
# Of a file: fewer say nothing.
LEAST_PAIRS = 2
# So many say it though some ids be above 65,535.
CERTAIN_PAIRS = 16
# In a row: any run of 1,023 ids or more of 2 bytes holds so many that begin at a multiple.
PAIRS_OF_A_RUN = 256
LEAST_DIFFERENT = 8  # ids among them: "!?!?" of a text repeats the same few
SMALL_ID = 3  # the upper half of an id of 4 bytes is no more, of a vocabulary up to 262,144
# Shares of small ids, in every second place and in the others.
MANY = 0.99
FEW = 0.9
LOWER_HALF = 0xFFFF


def refuse_other_width(ids: AnyIds, path: str) -> None:
    """Raises UserError if every second uint16 is as the upper half of a wider id.

    Whichever half comes first.
    """
    pairs = len(ids) // 2
    if pairs < LEAST_PAIRS:
        return
    firsts = ids[0 : 2 * pairs : 2]
    seconds = ids[1::2]
    if pairs < CERTAIN_PAIRS:  # so few may be small by chance
        looks_wider = bool(firsts.any()) != bool(seconds.any())
    else:
        shares = [share_of_small(firsts), share_of_small(seconds)]
        looks_wider = min(shares) < FEW and max(shares) >= MANY
    if looks_wider:
        problem = f"every second id is at most {SMALL_ID}, as in ids of 4 or 8 bytes"
        raise UserError(f"{path}: {problem}; {WRITE_UINT16}")


def share_of_small(ids: AnyIds) -> float:
    """The share of ids that may be the upper half of a wider one."""
    small = int(np.count_nonzero(ids <= SMALL_ID))
    return small / len(ids)


def refuse_other_width_anywhere(ids: AnyIds, path: str, first_byte: int) -> None:
    """Raises UserError if ids that were read hold wider ones, all of them or a run within them.

    `first_byte` is where `ids` lies in the file.
    """
    refuse_runs_of_other_width(ids, path, first_byte)
    windows = len(ids) // WINDOW_IDS
    for window in ids[: windows * WINDOW_IDS].reshape(windows, WINDOW_IDS):
        refuse_other_width(window, path)
    # What is left, with what is before it.
    last = ids[-WINDOW_IDS:]
    if len(last) >= LEAST_IDS:
        refuse_other_width(last, path)


def refuse_runs_of_other_width(ids: AnyIds, path: str, first_byte: int) -> None:
    """Raises UserError, naming the byte, where every second uint16 of a run is 0.

    So lie ids of 4 or 8 bytes within a file of 2, wherever they begin; `first_byte` is where `ids`
    lies in the file.
    """
    run_ids = 2 * PAIRS_OF_A_RUN
    last = len(ids) - run_ids
    if last < 0:
        return
    whole = len(ids) // run_ids * run_ids
    _refuse_wide_runs(ids[:whole], path, first_byte)
    _refuse_wide_runs(ids[last:], path, first_byte + 2 * last)


def _refuse_wide_runs(ids: AnyIds, path: str, first_byte: int) -> None:
    """The same of a whole number of runs."""
    # Shape (runs, pairs), each pair as one number, of which the first id is the lower half.
    pairs = ids.view("<u4").reshape(-1, PAIRS_OF_A_RUN)
    # Two pairs of each run first: to look at all takes a sixth of the time of reading.
    middle = PAIRS_OF_A_RUN // 2
    suspects = np.flatnonzero(_is_half_empty(pairs[:, 0] | pairs[:, middle]))
    # Bits of all firsts of a run, and of all seconds.
    seen = np.bitwise_or.reduce(pairs[suspects], axis=1)
    is_wide = _is_half_empty(seen) & (seen != 0)
    for number in suspects[is_wide].tolist():
        if len(np.unique(pairs[number])) < LEAST_DIFFERENT:
            continue
        run_ids = 2 * PAIRS_OF_A_RUN
        at = first_byte + 2 * number * run_ids
        problem = f"at byte {at:,} every second id of {run_ids} is 0, as in ids of 4 or 8 bytes"
        raise UserError(f"{path}: {problem}; {WRITE_UINT16}")


def _is_half_empty(pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Which pairs have a 0 in one of their places, or in both."""
    is_first_empty = pairs & LOWER_HALF == 0
    is_second_empty = pairs >> 16 == 0
    is_half_empty: npt.NDArray[np.bool_] = is_first_empty | is_second_empty
    return is_half_empty
