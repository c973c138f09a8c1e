"""A run opened to be measured: a good checkpoint of it, and the text to measure it on."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.shards import TOKENIZER_NAME, ShardReader, tokenizer_sha256
from data_prep.tokenizer.text_files import TextFile
from pretrain.checkpoint.find import is_checkpoint, load_for_reading, run_of
from pretrain.checkpoint.reader import Checkpoint
from pretrain.data.digests import check_shards
from pretrain.data.tokenizer_definition import DEFINITION_NAME, give_the_same_ids
from pretrain.evaluation.text import MeasuredText, run_encoder, text_of_files, validation_text
from pretrain.evaluation.windows import Windows, windows_of
from pretrain.modeling_tablefree import TableFreeConfig


@dataclass(frozen=True, kw_only=True)
class AskedText:
    """What a run is to be measured on, and how. Nothing given: its own data set, in blocks."""

    data_dir: Path | None = None  # the data set, or another one of the same tokenizer
    files: TextFile | None = None  # in place of a data set
    stride: int | None = None  # between windows that slide


@dataclass(frozen=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint that was found good, and its run."""

    checkpoint: Checkpoint
    is_newest: bool  # of its run
    run_dir: Path | None  # None for a checkpoint that lies by itself


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A checkpoint and a text, both found good."""

    opened: OpenCheckpoint
    text: MeasuredText
    other_place: Path | None  # where the text lies, if the run was not trained on that data
    windows: Windows


def open_checkpoint(place: Path, step: int | None) -> OpenCheckpoint:
    """A run, or one checkpoint: `place` is a run's directory or a checkpoint's.

    Without `step` the newest good one is taken. Raises UserError for what is not there or damaged.
    """
    checkpoint = load_for_reading(place, step)
    return OpenCheckpoint(
        checkpoint=checkpoint,
        is_newest=step is None and not is_checkpoint(place),
        run_dir=run_of(checkpoint, place),
    )


def open_run(place: Path, step: int | None, asked: AskedText) -> OpenRun:
    """A checkpoint as `open_checkpoint` finds it, with the text to measure it on.

    Raises UserError for what is not there, damaged, or does not go together.
    """
    opened = open_checkpoint(place, step)
    checkpoint = opened.checkpoint
    windows = windows_of(context_of(checkpoint), asked.stride)
    if asked.files is not None:
        encoder = run_encoder(opened.run_dir, checkpoint.manifest.data.tokenizer_sha256)
        text = text_of_files(asked.files, encoder)
        other_place: Path | None = Path(asked.files.path)
    else:
        reader = open_data(checkpoint, asked.data_dir, opened.run_dir)
        check_shards(reader, reader.manifest.shards_of("validation"))
        text = validation_text(reader)
        other_place = place_of_other_data(checkpoint, reader)
    return OpenRun(opened=opened, text=text, other_place=other_place, windows=windows)


def context_of(checkpoint: Checkpoint) -> int:
    """How many ids the model sees at most."""
    return int(TableFreeConfig.from_dict(checkpoint.manifest.model_config).seq_len)


def place_of_other_data(checkpoint: Checkpoint, reader: ShardReader) -> Path | None:
    """Where a data set lies that the run was not trained on; None for the one that it was.

    By what the data holds, not by where it lies: data sets are moved.
    """
    if reader.manifest.fingerprint == checkpoint.manifest.fingerprint:
        return None
    return reader.data_dir


def open_data(
    checkpoint: Checkpoint, data_dir: Path | None, run_dir: Path | None = None
) -> ShardReader:
    """The data set that the run was trained on, or another one of the same tokenizer.

    The first may have moved. Raises UserError for any other.
    """
    imported_from = checkpoint.manifest.imported_from
    if data_dir is None and imported_from is not None:
        raise UserError(
            f"{checkpoint.path}: has the weights of {imported_from}, and saw no data set yet; say "
            "on which to measure it with --data-dir"
        )
    path = data_dir or Path(checkpoint.manifest.data_dir)
    if data_dir is None and not path.is_dir():
        raise UserError(f"{path}: the data set of this run is not there; say where with --data-dir")
    reader = ShardReader(path)
    expected = checkpoint.manifest.fingerprint
    got = reader.manifest.fingerprint
    if got == expected:
        return reader
    difference = f"{path}: fingerprint {got}, but the run was trained on {expected}"
    if data_dir is None:
        raise UserError(f"{difference}; say where that is with --data-dir")
    # So that its tokenizer is the one that its manifest tells, by which it is compared below.
    reader.check_files()
    if imported_from is not None and run_dir is not None:
        refuse_other_ids(run_dir, path)
        return reader
    own = tokenizer_of(checkpoint, run_dir)
    others = reader.manifest.tokenizer_sha256
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


def refuse_other_ids(run_dir: Path, data_dir: Path) -> None:
    """Raise UserError where a data set's tokenizer gives other ids than a run's copy of it.

    Files beside `tokenizer.json` are made anew by exports, and so by imports.
    """
    own = run_dir / TOKENIZER_NAME / DEFINITION_NAME
    theirs = data_dir / TOKENIZER_NAME / DEFINITION_NAME
    if not own.is_file() or not give_the_same_ids(own.read_bytes(), theirs.read_bytes()):
        raise UserError(
            f"{data_dir}: its tokenizer is not that of {run_dir}, whose weights are of other ids"
        )


def tokenizer_of(checkpoint: Checkpoint, run_dir: Path | None) -> str | None:
    """The identity of a run's tokenizer.

    Its checkpoint tells it or, in early ones, its copy of the tokenizer; None without both.
    """
    told: str | None = checkpoint.manifest.data.tokenizer_sha256
    if told:
        return told
    if run_dir is None or not (run_dir / TOKENIZER_NAME).is_dir():
        return None
    return tokenizer_sha256(run_dir / TOKENIZER_NAME)
