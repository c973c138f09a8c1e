"""What an export and the class that trained it are given to compare, and what that class computes.

Windows are of the run's validation split where its data set is at hand, else ids drawn from the
vocabulary. Their number follows the size of the model, so that a proof takes seconds for a small
model and a minute or two for a big one.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from data_prep.errors import UserError, one_line
from data_prep.shards import ShardReader
from pretrain.checkpoint.reader import Checkpoint, load_model
from pretrain.data.loader import ValidationWindows
from pretrain.hf.certificate import DRAWN, VALIDATION, Windows

MOST_WINDOWS = 64
# Parameters times positions of all windows: of 470 M and 1,024 positions two, which take two cores
# half a minute in each class.
MOST_WORK = 1_000_000_000_000
MOST_LOGIT_BYTES = 1 << 30  # of all windows, in a file beside the export while it is made
SEED = 20_260_509  # of drawn ids
# Of the sketch: at each a sum, and enough to reach every part of a model.
SKETCHED_WINDOWS = 4
SKETCHED_POSITIONS = 64
PROMPT_TOKENS = 16
# Threads wait for one another longer than small models compute. Not as many as there are cores to
# use just now: the last digits of sums may hang on their number, and are to be the same again.
SMALL = 20_000_000  # parameters
MOST_THREADS = 8

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Given:
    """Windows of ids, (windows, T + 1), and what is to be said of them."""

    ids: Ids
    about: Windows


def size_of(checkpoint: Checkpoint) -> int:
    """How many parameters were trained."""
    return sum(math.prod(shape) for shape in checkpoint.shapes.values())


def threads_for(parameters: int) -> int:
    """How many threads compute a model, always the same on a machine."""
    return 1 if parameters < SMALL else min(MOST_THREADS, os.cpu_count() or 1)


def most_windows(checkpoint: Checkpoint, seq_len: int, vocab_size: int) -> int:
    """How many windows a model of this size is given, 1 at least."""
    by_work = MOST_WORK // (size_of(checkpoint) * seq_len)
    by_room = MOST_LOGIT_BYTES // (4 * seq_len * vocab_size)
    return max(1, min(MOST_WINDOWS, by_work, by_room))


def choose_windows(checkpoint: Checkpoint, seq_len: int, vocab_size: int) -> Given:
    """Windows for a model that takes `seq_len` tokens, spread evenly over the validation split."""
    most = most_windows(checkpoint, seq_len, vocab_size)
    fewer = "as many as a model of this size is given" if most < MOST_WINDOWS else None
    try:
        windows = open_validation(checkpoint, seq_len)
    except (UserError, OSError) as error:
        # An export needs no data set: it may be made where there is none.
        ids = drawn_ids((most, seq_len + 1), vocab_size, SEED)
        about = Windows(
            kind=DRAWN,
            number=most,
            positions=seq_len,
            of=most,
            why=f"the data set is not at hand ({without_paths(error, checkpoint)})",
        )
        return Given(ids=ids, about=about)
    whole = windows.whole_windows
    number = min(most, whole)
    chosen = np.arange(number) * whole // number
    about = Windows(
        kind=VALIDATION,
        number=number,
        positions=seq_len,
        of=whole,
        why=fewer if number < whole else None,
    )
    return Given(ids=windows.windows(chosen).astype(np.int32), about=about)


def open_validation(checkpoint: Checkpoint, seq_len: int) -> ValidationWindows:
    """The validation split of a run. Raises UserError where it isn't there, or has no window."""
    data_dir = Path(checkpoint.manifest.data_dir)
    reader = ShardReader(data_dir)
    if reader.manifest.fingerprint != checkpoint.manifest.fingerprint:
        raise UserError(f"{data_dir}: is another data set by now")
    windows = ValidationWindows(reader, seq_len=seq_len)
    if windows.whole_windows < 1:
        raise UserError(f"{data_dir}: its validation split is shorter than one window")
    return windows


def without_paths(error: Exception, checkpoint: Checkpoint) -> str:
    """What an error says, without folders of this machine: an export is published."""
    said = one_line(error).replace(checkpoint.manifest.data_dir, "data set")
    return said.partition("; ")[0]


def drawn_ids(shape: tuple[int, int], vocab_size: int, seed: int) -> Ids:
    """Ids drawn evenly from a vocabulary, (windows, length); a seed always gives the same."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocab_size, shape, generator=generator)
    return drawn.numpy().astype(np.int32)


def prompts_of(ids: Ids, seq_len: int) -> list[list[int]]:
    """Two prompts for greedy text, of unequal length, so that the shorter one is padded."""
    longer = max(1, min(PROMPT_TOKENS, seq_len // 2))
    shorter = max(1, longer // 3)
    return [ids[0, :longer].tolist(), ids[-1, :shorter].tolist()]


def write_logits(checkpoint: Checkpoint, given: Given, path: Path) -> None:
    """What the training class computes from the fp32 masters: (windows, T, V), fp32, npy."""
    shape = (given.about.number, given.about.positions)
    with threads(threads_for(size_of(checkpoint))), torch.no_grad():
        model = load_model(checkpoint)
        model.eval()  # type: ignore[no-untyped-call]
        whole = (*shape, model.config.vocab_size)
        logits = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=whole)
        for number, row in enumerate(given.ids):
            ids_BT = torch.from_numpy(row[None, :-1].astype(np.int64))
            logits[number] = model(ids_BT).logits[0].numpy()
        logits.flush()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch compute with so many, since sums may come out otherwise with others."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_texts(reference: Tokenizer, given: Given, eos_id: int, path: Path) -> None:
    """The windows' documents as ids, the text of these, and the ids of that text, as the data's
    own tokenizer has them; JSON.
    """
    pieces: list[dict[str, Any]] = []
    for row in given.ids:
        # An id that ends a document is no text.
        ends = np.flatnonzero(row == eos_id)
        for part in np.split(row, ends):
            ids = part[part != eos_id].tolist()
            if not ids:
                continue
            text = reference.decode(ids, skip_special_tokens=False)
            again = reference.encode(text, add_special_tokens=False).ids
            pieces.append({"ids": ids, "text": text, "again": again})
    path.write_text(json.dumps(pieces), encoding="utf-8")
