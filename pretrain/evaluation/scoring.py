"""Scores a model on a whole validation split, and on each of its sources.

The figures are loss, perplexity and bits per byte.

The split is one stream of ids, cut into non-overlapping windows and a final partial one; each id
after the first is a target exactly once. Bits per byte = total nats / (ln 2 x UTF-8 bytes of the
text): unlike perplexity, it can be compared between tokenizers.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_prep.manifest import Manifest
from data_prep.shards import ShardReader, Tokens
from pretrain.checkpoint.reader import Checkpoint, load_model
from pretrain.data.loader import ValidationWindows
from pretrain.evaluation.result import EvaluationResult, Score
from pretrain.metrics.step_record import perplexity_of
from pretrain.model.loss import LanguageModelLoss

WINDOWS_AT_ONCE = 8


class Totals(NamedTuple):
    """What was summed over each source, in the order of the stream."""

    nats: npt.NDArray[np.float64]
    targets: npt.NDArray[np.int64]


def score(nats: float, targets: int, text_bytes: int) -> Score:
    """The figures of a text that follow from total nats."""
    loss = math.nan
    if targets:
        loss = nats / targets
    bits_per_byte = math.nan
    if text_bytes:
        bits_per_byte = nats / (math.log(2) * text_bytes)
    return Score(
        targets=targets,
        text_bytes=text_bytes,
        loss=loss,
        perplexity=perplexity_of(loss),
        bits_per_byte=bits_per_byte,
    )


def window_batches(windows: ValidationWindows) -> Iterator[Tokens]:
    """Ids of windows to score together, (windows, seq_len + 1).

    Whole ones come in groups, then the partial one by itself.
    """
    whole = windows.whole_windows
    starts = range(0, whole, WINDOWS_AT_ONCE)
    for first in tqdm(starts, unit="batch", desc="evaluating", disable=None):
        past_last = min(first + WINDOWS_AT_ONCE, whole)
        yield windows.windows(np.arange(first, past_last))
    has_partial_window = windows.targets % windows.seq_len > 0
    if has_partial_window:
        yield windows.window(whole)[None]


def source_totals(
    module: LanguageModelLoss, windows: ValidationWindows, source_ends: npt.NDArray[np.int64]
) -> Totals:
    """Total nats and number of targets of each source.

    `source_ends`, (sources,), holds the position in the stream at which the next source starts.
    """
    sources = len(source_ends)
    device = next(module.parameters()).device
    nats = np.zeros(sources)
    targets = np.zeros(sources, np.int64)
    position = 1  # of the next target; the first id is none
    for ids in window_batches(windows):
        ids_BT = torch.from_numpy(ids.astype(np.int64)).to(device)
        nats_BT = module.nats(ids_BT[:, :-1], ids_BT[:, 1:])
        # In fp64, so that a sum over a whole split keeps the digits that are printed.
        nats_of_target = nats_BT.double().flatten().cpu().numpy()
        count = len(nats_of_target)
        positions = position + np.arange(count)
        source_of_target = np.searchsorted(source_ends, positions, side="right")
        nats += np.bincount(source_of_target, weights=nats_of_target, minlength=sources)
        targets += np.bincount(source_of_target, minlength=sources)
        position += count
    return Totals(nats, targets)


def text_bytes_by_source(manifest: Manifest) -> dict[str, int]:
    """UTF-8 bytes of each source's validation text, in the order of the stream."""
    found: dict[str, int] = {}
    for shard in manifest.shards_of("validation"):
        found[shard.source] = found.get(shard.source, 0) + shard.text_bytes
    return found


def scoring_module(checkpoint: Checkpoint, manifest: Manifest) -> LanguageModelLoss:
    """The fp32 masters on this machine's device, to be scored as they were trained.

    That is with documents apart if the run had intra_document_masking.
    """
    # Not in the recipes of early checkpoints.
    is_masked = checkpoint.manifest.recipe.get("intra_document_masking", False)
    eos_id = manifest.eos_id if is_masked else None
    module = LanguageModelLoss(load_model(checkpoint), eos_id=eos_id)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return module.to(device).eval()


def evaluate(checkpoint: Checkpoint, reader: ShardReader) -> EvaluationResult:
    """The figures of the whole validation split, and of each source."""
    manifest = reader.manifest
    module = scoring_module(checkpoint, manifest)
    windows = ValidationWindows(reader, seq_len=module.model.config.seq_len)
    text_bytes = text_bytes_by_source(manifest)
    # Shards of one source lie together, in the order of `text_bytes`.
    tokens = [manifest.tokens("validation", name) for name in text_bytes]
    totals = source_totals(module, windows, np.cumsum(tokens, dtype=np.int64))
    sources = {}
    for index, name in enumerate(text_bytes):
        nats = float(totals.nats[index])
        targets = int(totals.targets[index])
        sources[name] = score(nats, targets, text_bytes[name])
    # By what the data holds, not by where it lies: data sets are moved.
    is_own_data = manifest.fingerprint == checkpoint.manifest.fingerprint
    return EvaluationResult(
        step=checkpoint.step,
        fingerprint=manifest.fingerprint,
        whole_split=score(
            float(totals.nats.sum()), int(totals.targets.sum()), sum(text_bytes.values())
        ),
        sources=sources,
        data_dir=None if is_own_data else reader.data_dir.resolve(),
    )
