"""Score a run on a whole validation split, with the fp32 masters of its newest checkpoint or of
another.

    python -m pretrain.evaluate --run-dir RUN_DIR [--step N] [--data-dir DATASET]

    RUN_DIR/evaluation.json                               the newest checkpoint, on the run's own data set
    RUN_DIR/evaluations/step-00000100.json                that of --step 100
    RUN_DIR/evaluations/step-00000100.FINGERPRINT.json    on another data set of the same tokenizer

The split is one stream of ids, cut into non-overlapping windows and a final partial one; each id
after the first is a target exactly once. A run trained with intra_document_masking is scored with
it. Bits per byte = total nats / (ln 2 x UTF-8 bytes of the text): unlike perplexity, it can be
compared between tokenizers.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError
from data_prep.files import write_durably
from data_prep.shards import TOKENIZER_NAME, ShardReader, Tokens, tokenizer_sha256
from pretrain.checkpoint.find import is_checkpoint, load_for_reading, run_of
from pretrain.checkpoint.reader import Checkpoint, load_model
from pretrain.data.digests import check_shards
from pretrain.data.loader import ValidationWindows
from pretrain.distributed.devices import keep_freed_memory
from pretrain.evaluation.result import EVALUATION_NAME, EVALUATIONS_NAME
from pretrain.model.loss import LanguageModelLoss
from pretrain.view.templates import render

WINDOWS_AT_ONCE = 8


def score(nats: float, targets: int, text_bytes: int) -> dict[str, float]:
    """The figures of a text under a model that follow from total nats.

    `targets` are the ids that were predicted, end-of-document ids included; `text_bytes` those of
    the text in UTF-8, without end-of-document; `loss` is in nats a target.
    """
    loss = nats / targets if targets else math.nan
    return {
        "targets": targets,
        "text_bytes": text_bytes,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / (math.log(2) * text_bytes) if text_bytes else math.nan,
    }


def open_data(
    checkpoint: Checkpoint, data_dir: Path | None, run_dir: Path | None = None
) -> ShardReader:
    """The data set that the run was trained on, there or at another place; or another one of the
    same tokenizer.
    """
    path = data_dir or Path(checkpoint.manifest.data_dir)
    if data_dir is None and not path.is_dir():
        raise UserError(f"{path}: the data set of this run is not there; say where with --data-dir")
    reader = ShardReader(path)
    expected, got = checkpoint.manifest.fingerprint, reader.manifest.fingerprint
    if got == expected:
        return reader
    difference = f"{path}: fingerprint {got}, but the run was trained on {expected}"
    if data_dir is None:
        raise UserError(f"{difference}; say where that is with --data-dir")
    reader.check_files()
    own, others = tokenizer_of(checkpoint, run_dir), reader.manifest.tokenizer_sha256
    if own is None:
        raise UserError(
            f"{difference}, and whether with the same tokenizer can't be told: the run keeps none"
        )
    if own != others:
        raise UserError(
            f"{difference}, with another tokenizer (sha256 {own[:12]}, not {others[:12]}); build "
            "it with the run's"
        )
    return reader


def tokenizer_of(checkpoint: Checkpoint, run_dir: Path | None) -> str | None:
    """The identity of a run's tokenizer, as its checkpoint or, in early ones, its copy of the
    tokenizer tells.
    """
    told: str | None = checkpoint.manifest.data.tokenizer_sha256
    if told or run_dir is None or not (run_dir / TOKENIZER_NAME).is_dir():
        return told or None
    return tokenizer_sha256(run_dir / TOKENIZER_NAME)


def evaluation_path(
    run_dir: Path, checkpoint: Checkpoint, fingerprint: str, *, is_newest: bool
) -> Path:
    """Where figures go, so that none take the place of others."""
    is_own = fingerprint == checkpoint.manifest.fingerprint
    if is_newest and is_own:
        return run_dir / EVALUATION_NAME
    data = "" if is_own else f".{fingerprint}"
    return run_dir / EVALUATIONS_NAME / f"{checkpoint.path.name}{data}.json"


def window_batches(windows: ValidationWindows) -> Iterator[Tokens]:
    """Ids of windows to score together, (windows, seq_len + 1): whole ones in groups, then the
    partial one.
    """
    whole = windows.whole_windows
    for first in tqdm(
        range(0, whole, WINDOWS_AT_ONCE), unit="batch", desc="evaluating", disable=None
    ):
        yield windows.windows(np.arange(first, min(first + WINDOWS_AT_ONCE, whole)))
    if windows.targets % windows.seq_len:
        yield windows.window(whole)[None]


def source_totals(
    module: LanguageModelLoss, windows: ValidationWindows, source_ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Total nats and number of targets of each source; a source ends where the next one starts
    in the stream.
    """
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


def evaluate(
    checkpoint: Checkpoint, reader: ShardReader
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Figures of the whole validation split, and of each source."""
    model = load_model(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # not in checkpoints of old
    masked = checkpoint.manifest.recipe.get("intra_document_masking", False)
    module = (
        LanguageModelLoss(model, eos_id=reader.manifest.eos_id if masked else None)
        .to(device)
        .eval()
    )
    windows = ValidationWindows(reader, seq_len=model.config.seq_len)
    shards = reader.manifest.shards_of("validation")
    names = list(dict.fromkeys(shard.source for shard in shards))
    ends = np.cumsum([reader.manifest.tokens("validation", name) for name in names], dtype=np.int64)
    nats, targets = source_totals(module, windows, ends)
    text_bytes = [sum(s.text_bytes for s in shards if s.source == name) for name in names]
    figures = zip(nats.tolist(), targets.tolist(), text_bytes, strict=True)
    by_source = {name: score(*totals) for name, totals in zip(names, figures, strict=True)}
    return score(float(nats.sum()), int(targets.sum()), sum(text_bytes)), by_source


def note(content: dict[str, Any], path: Path) -> None:
    """Write figures that were printed; where that can't be, they were not measured for nothing."""
    try:
        write_durably(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        print(
            f"warning: {path}: {error.strerror}; the figures above are not kept there",
            file=sys.stderr,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    about = (
        "Loss, perplexity and bits per byte over the whole validation split, with the fp32 "
        "masters of the newest"
    )
    about += (
        " good checkpoint or of --step; also written into the run's directory, as the README says "
        "where."
    )
    parser = CommandParser(prog="python -m pretrain.evaluate", description=about)
    run_help = "directory of a run of pretrain.train, or of one of its checkpoints"
    parser.add_argument("--run-dir", required=True, type=Path, help=run_help)
    parser.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint after N steps, in place of the newest"
    )
    data_help = (
        "the data set, if it moved since training, or another one made with the same tokenizer"
    )
    parser.add_argument("--data-dir", type=Path, help=data_help)
    flags = parser.parse_args(arguments)
    keep_freed_memory()
    checkpoint = load_for_reading(flags.run_dir, flags.step)
    run_dir = run_of(checkpoint, flags.run_dir)
    reader = open_data(checkpoint, flags.data_dir, run_dir)
    fingerprint = reader.manifest.fingerprint
    check_shards(reader, reader.manifest.shards_of("validation"))
    total, by_source = evaluate(checkpoint, reader)
    rows = {"whole split": total} | (by_source if len(by_source) > 1 else {})
    other_data = (
        None
        if fingerprint == checkpoint.manifest.fingerprint
        else f"{reader.data_dir} ({fingerprint})"
    )
    print(
        render("evaluation.txt.jinja", path=checkpoint.path, rows=rows, other_data=other_data),
        flush=True,
    )
    if run_dir is None:
        print(
            f"{checkpoint.path}: lies in no run's directory, so the figures are printed alone",
            file=sys.stderr,
        )
        return
    content = {"step": checkpoint.step, "fingerprint": fingerprint, **total, "sources": by_source}
    if other_data:
        content["data_dir"] = str(reader.data_dir.resolve())
    is_newest = flags.step is None and not is_checkpoint(flags.run_dir)
    note(content, evaluation_path(run_dir, checkpoint, fingerprint, is_newest=is_newest))


if __name__ == "__main__":
    sys.exit(exit_code(main))
