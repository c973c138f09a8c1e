"""Score a run on the whole validation split, with the fp32 masters of its newest checkpoint.

    python -m pretrain.evaluate --run-dir RUN_DIR [--data-dir DATASET]

The split is one stream of ids, cut into non-overlapping windows and a final partial one; each id after the
first is a target exactly once. A run trained with intra_document_masking is scored with it. Bits per byte = total
nats / (ln 2 x UTF-8 bytes of the text): unlike perplexity, it can be compared between tokenizers.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_prep.errors import CommandParser, UserError, exit_code
from data_prep.shards import ShardReader, Tokens, write_durably
from pretrain.checkpoint import Checkpoint, load_for_reading, load_model
from pretrain.distributed import keep_freed_memory
from pretrain.loader import ValidationWindows
from pretrain.loss import LanguageModelLoss

EVALUATION_NAME = "evaluation.json"
WINDOWS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Score:
    """Figures of a text under a model."""

    targets: int  # ids that were predicted, end-of-document ids included
    text_bytes: int  # UTF-8 bytes of the text, without end-of-document
    loss: float  # nats a target
    perplexity: float
    bits_per_byte: float


def score(nats: float, targets: int, text_bytes: int) -> Score:
    """The figures that follow from total nats."""
    loss = nats / targets if targets else math.nan
    return Score(
        targets=targets, text_bytes=text_bytes, loss=loss, perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / (math.log(2) * text_bytes) if text_bytes else math.nan,
    )  # fmt: skip


def open_data(checkpoint: Checkpoint, data_dir: Path | None) -> ShardReader:
    """The data set that the run was trained on, there or at another place."""
    trained_on = Path(checkpoint.manifest["data_dir"])
    if data_dir is None and not trained_on.is_dir():
        raise UserError(f"the data set of this run is not at {trained_on} any more; say where with --data-dir")
    reader = ShardReader(data_dir or trained_on)
    expected, got = checkpoint.manifest["fingerprint"], reader.manifest.fingerprint
    if got != expected:
        raise UserError(f"{reader.data_dir}: fingerprint {got}, but the run was trained on {expected}; give --data-dir")
    return reader


def window_batches(windows: ValidationWindows) -> Iterator[tuple[npt.NDArray[np.int64], Tokens]]:
    """Windows to score together, whole ones in groups, then the partial one: numbers, ids (windows, seq_len + 1)."""
    whole = windows.whole_windows
    for first in tqdm(range(0, whole, WINDOWS_AT_ONCE), unit="batch", desc="evaluating", disable=None):
        batch = np.arange(first, min(first + WINDOWS_AT_ONCE, whole))
        yield batch, windows.windows(batch)
    if windows.targets % windows.seq_len:
        yield np.array([whole]), windows.window(whole)[None]


def source_totals(
    module: LanguageModelLoss, windows: ValidationWindows, source_ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Total nats and number of targets of each source; a source ends where the next one starts in the stream."""
    device = next(module.parameters()).device
    nats, targets = np.zeros(len(source_ends)), np.zeros(len(source_ends), np.int64)
    for batch, ids in window_batches(windows):
        ids_BT = torch.from_numpy(ids.astype(np.int64)).to(device)
        nats_BT = module.nats(ids_BT[:, :-1], ids_BT[:, 1:]).double().cpu().numpy()
        positions_BT = batch[:, None] * windows.seq_len + 1 + np.arange(nats_BT.shape[1])
        sources = np.searchsorted(source_ends, positions_BT.ravel(), side="right")
        nats += np.bincount(sources, weights=nats_BT.ravel(), minlength=len(nats))
        targets += np.bincount(sources, minlength=len(targets))
    return nats, targets


def evaluate(checkpoint: Checkpoint, reader: ShardReader) -> tuple[Score, dict[str, Score]]:
    """Figures of the whole validation split, and of each source."""
    model = load_model(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    masked = checkpoint.manifest["recipe"].get("intra_document_masking", False)  # not in checkpoints of old
    module = LanguageModelLoss(model, eos_id=reader.manifest.eos_id if masked else None).to(device).eval()
    windows = ValidationWindows(reader, seq_len=model.config.seq_len)
    shards = reader.manifest.shards_of("validation")
    names = list(dict.fromkeys(shard.source for shard in shards))
    ends = np.cumsum([reader.manifest.tokens("validation", name) for name in names], dtype=np.int64)
    nats, targets = source_totals(module, windows, ends)
    text_bytes = [sum(s.text_bytes for s in shards if s.source == name) for name in names]
    of_sources = zip(names, nats.tolist(), targets.tolist(), text_bytes, strict=True)
    by_source = {name: score(n, t, b) for name, n, t, b in of_sources}
    return score(float(nats.sum()), int(targets.sum()), sum(text_bytes)), by_source


def report(checkpoint: Checkpoint, total: Score, by_source: dict[str, Score]) -> str:
    """The figures as a table."""
    rows = [("whole split", total)] + (list(by_source.items()) if len(by_source) > 1 else [])
    width = max(len(name) for name, _ in rows)
    lines = [f"{checkpoint.path}", f"{'':{width}}  {'targets':>12}  {'loss':>8}  {'perplexity':>10}  bits per byte"]
    lines += [
        f"{name:{width}}  {s.targets:>12,}  {s.loss:>8.4f}  {s.perplexity:>10.2f}  {s.bits_per_byte:>13.4f}"
        for name, s in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    about = "Loss, perplexity and bits per byte over the whole validation split, with the fp32 masters of the newest"
    about += " good checkpoint; also written as RUN_DIR/evaluation.json."
    parser = CommandParser(prog="python -m pretrain.evaluate", description=about)
    parser.add_argument("--run-dir", required=True, type=Path, help="directory of a run of pretrain.train")
    parser.add_argument("--data-dir", type=Path, help="the data set, if it moved since training")
    flags = parser.parse_args(arguments)
    keep_freed_memory()
    checkpoint = load_for_reading(flags.run_dir)
    reader = open_data(checkpoint, flags.data_dir)
    total, by_source = evaluate(checkpoint, reader)
    content = {"step": checkpoint.step, "fingerprint": reader.manifest.fingerprint, **asdict(total)}
    content["sources"] = {name: asdict(figures) for name, figures in by_source.items()}
    write_durably(flags.run_dir / EVALUATION_NAME, json.dumps(content, indent=1).encode())
    print(report(checkpoint, total, by_source))


if __name__ == "__main__":
    sys.exit(exit_code(main))
