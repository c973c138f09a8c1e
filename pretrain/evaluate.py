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
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_prep.errors import CommandParser, UserError, exit_code
from data_prep.shards import ShardReader, Tokens, write_durably
from pretrain.checkpoint import Checkpoint, load_for_reading, load_model
from pretrain.digests import check_shards
from pretrain.distributed import keep_freed_memory
from pretrain.loader import ValidationWindows
from pretrain.loss import LanguageModelLoss
from pretrain.templates import render

EVALUATION_NAME = "evaluation.json"
WINDOWS_AT_ONCE = 8


def score(nats: float, targets: int, text_bytes: int) -> dict[str, float]:
    """The figures of a text under a model that follow from total nats.

    `targets` are the ids that were predicted, end-of-document ids included; `text_bytes` those of the text in UTF-8,
    without end-of-document; `loss` is in nats a target.
    """
    loss = nats / targets if targets else math.nan
    return {
        "targets": targets, "text_bytes": text_bytes, "loss": loss, "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / (math.log(2) * text_bytes) if text_bytes else math.nan,
    }  # fmt: skip


def open_data(checkpoint: Checkpoint, data_dir: Path | None) -> ShardReader:
    """The data set that the run was trained on, there or at another place."""
    path = data_dir or Path(checkpoint.manifest["data_dir"])
    if not path.is_dir():
        raise UserError(f"{path}: the data set of this run is not there; say where with --data-dir")
    reader = ShardReader(path)
    expected, got = checkpoint.manifest["fingerprint"], reader.manifest.fingerprint
    if got != expected:
        raise UserError(f"{reader.data_dir}: fingerprint {got}, but the run was trained on {expected}; give --data-dir")
    return reader


def window_batches(windows: ValidationWindows) -> Iterator[Tokens]:
    """Ids of windows to score together, (windows, seq_len + 1): whole ones in groups, then the partial one."""
    whole = windows.whole_windows
    for first in tqdm(range(0, whole, WINDOWS_AT_ONCE), unit="batch", desc="evaluating", disable=None):
        yield windows.windows(np.arange(first, min(first + WINDOWS_AT_ONCE, whole)))
    if windows.targets % windows.seq_len:
        yield windows.window(whole)[None]


def source_totals(
    module: LanguageModelLoss, windows: ValidationWindows, source_ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Total nats and number of targets of each source; a source ends where the next one starts in the stream."""
    device, position = next(module.parameters()).device, 1
    nats, targets = np.zeros(len(source_ends)), np.zeros(len(source_ends), np.int64)
    for ids in window_batches(windows):
        ids_BT = torch.from_numpy(ids.astype(np.int64)).to(device)
        of_targets = module.nats(ids_BT[:, :-1], ids_BT[:, 1:]).double().flatten().cpu().numpy()
        sources = np.searchsorted(source_ends, position + np.arange(len(of_targets)), side="right")
        nats += np.bincount(sources, weights=of_targets, minlength=len(nats))
        targets += np.bincount(sources, minlength=len(targets))
        position += len(of_targets)
    return nats, targets


def evaluate(checkpoint: Checkpoint, reader: ShardReader) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
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
    figures = zip(nats.tolist(), targets.tolist(), text_bytes, strict=True)
    by_source = {name: score(*totals) for name, totals in zip(names, figures, strict=True)}
    return score(float(nats.sum()), int(targets.sum()), sum(text_bytes)), by_source


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
    check_shards(reader, reader.manifest.shards_of("validation"))
    total, by_source = evaluate(checkpoint, reader)
    content = {"step": checkpoint.step, "fingerprint": reader.manifest.fingerprint, **total, "sources": by_source}
    write_durably(flags.run_dir / EVALUATION_NAME, json.dumps(content, indent=1).encode())
    rows = {"whole split": total} | (by_source if len(by_source) > 1 else {})
    print(render("evaluation.txt.jinja", path=checkpoint.path, rows=rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
