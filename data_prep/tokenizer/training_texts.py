"""The documents that a tokenizer is learned from.

They are of the files named, or of a mixture in the shares of its weights.

Used by `train_tokenizer`. Where all would be too much, the beginning of every work unit is taken.
Of a mixture the validation documents are left out, by the rule that `build_shards` has, and a
source that is too small for its share is read again, as training reads it again.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from data_prep.building.build_plan import source_files
from data_prep.building.left_out import FIRST_BAD_SHOWN, Tally, check_file, check_source
from data_prep.building.mixture import Mixture
from data_prep.building.validation_split import hash_texts, validation_threshold
from data_prep.building.work_units import SourceInputs, cut_units
from data_prep.errors import UserError
from data_prep.formats.documents import Documents
from data_prep.formats.known import find_files, format_of, place, read_documents, text_field_of
from data_prep.formats.pretokenized.documents import ID_FORMATS
from data_prep.formats.work_unit import WorkUnit
from data_prep.inputs.sources import InputFile


@dataclass(kw_only=True)
class TextSource:
    """Files that give a share of the text."""

    name: str
    files: list[InputFile]
    units: list[WorkUnit]
    share: float = 1.0  # of the characters, of 1
    characters: int = 0  # read so far
    held: int = 0  # characters of one reading
    tally: Tally = field(default_factory=Tally)  # of its rows, in one reading
    # The same by URL; of text files, each a row, none.
    of_files: dict[str, Tally] = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainingTexts:
    """The documents, source by source, max_characters at most; counted while they are read."""

    sources: list[TextSource]
    max_characters: int
    validation_fraction: float = 0.0  # of the documents, which are left out
    max_bad_fraction: float = 1.0  # of a source's rows and bytes, as far as they are read
    is_cut: bool = False  # a source was not read to its end
    bar: Any = field(init=False, default=None)

    @property
    def characters(self) -> int:
        """Read so far."""
        return sum(source.characters for source in self.sources)

    def __iter__(self) -> Iterator[str]:
        """Read them. Raises UserError if a source has no text."""
        with tqdm(
            desc="reading", unit=" characters", unit_scale=True, leave=False, disable=None
        ) as self.bar:
            for source in self.sources:
                yield from self._once(source, max(1, int(self.max_characters * source.share)))
                source.held = source.characters
                self._check(source)
            is_cut = self.is_cut
            # What the fullest source asks for.
            whole = max(source.held / source.share for source in self.sources)
            for source in self.sources:
                yield from self._again(source, int(whole * source.share))
        self._say_how(is_cut)

    def _check(self, source: TextSource) -> None:
        """Raises UserError if what was read of a source is bad for the most part, or nothing."""
        for url, tally in source.of_files.items():
            check_file(tally, f"{source.name}: {url}")
        check_source(source.tally, source.name, self.max_bad_fraction, "train again")
        if not source.held:
            raise UserError(
                f"{source.name}: no text to learn from in it; name files that hold some"
            )

    def _again(self, source: TextSource, wanted: int) -> Iterator[str]:
        """A source's documents once more, and again, until they hold so many characters in all."""
        before = -1
        while before < source.characters < wanted:
            before = source.characters
            yield from self._once(source, wanted - before)

    def _once(self, source: TextSource, limit: int) -> Iterator[str]:
        """A source's documents, evenly over its units, up to so many characters."""
        for number, unit in enumerate(source.units):
            share = limit // (len(source.units) - number)
            limit -= share
            if not share:
                self.is_cut = True
                continue
            for text in self._texts_of(source, unit):
                taken = min(len(text), share)
                yield text[:taken]
                self.bar.update(taken)
                source.characters += taken
                share -= taken
                if not share:
                    self.is_cut = True
                    break
            limit += share  # what a small unit leaves over, the next ones may use

    def _texts_of(self, source: TextSource, unit: WorkUnit) -> Iterator[str]:
        """A unit's documents for training; its rows are counted when they are read first."""
        for documents in read_documents(unit):
            if not source.held:
                count_rows(source, unit, documents)
            yield from self._for_training(documents.texts).to_pylist()

    def _for_training(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """Those that are no validation documents."""
        if not self.validation_fraction or not len(texts):
            return texts
        return texts.filter(
            pa.array(hash_texts(texts) >= validation_threshold(self.validation_fraction))
        )

    def _say_how(self, is_cut: bool) -> None:
        for source in self.sources:
            if source.characters > source.held:
                times = (
                    f"{source.characters / source.held:,.1f} times, for its share of "
                    f"{source.share:.1%}"
                )
                print(
                    f"note: {source.name} ({source.held:,} characters) was read {times}",
                    file=sys.stderr,
                )
        if is_cut:
            note = (
                f"learning from {self.characters:,} characters, evenly over the sources; "
                "--max-characters takes more"
            )
            print(f"note: {note}", file=sys.stderr)


def count_rows(source: TextSource, unit: WorkUnit, documents: Documents) -> None:
    """Add a batch's rows to what came of the source's, and of its file's."""
    part = unit.parts()[documents.file]
    tallies = [source.tally]
    if not unit.files_are_rows:
        tallies.append(source.of_files.setdefault(part.url, Tally()))
    for tally in tallies:
        tally.documents += len(documents.texts)
        tally.empty += documents.empty
        tally.bad += len(documents.bad)
        tally.row_bytes += documents.row_bytes
        tally.bad_bytes += documents.bad_bytes
        for row, reason in documents.bad[: FIRST_BAD_SHOWN - len(tally.first_bad)]:
            tally.first_bad.append(f"{place(part, row - documents.rows_before)}: {reason}")


def texts_of_files(
    patterns: Sequence[str], format: str | None, text_field: str, max_characters: int
) -> TrainingTexts:
    """All documents of the files named. Raises UserError for a file named twice."""
    files: list[InputFile] = []
    for pattern in patterns:
        files += find_files(format, Path(), pattern, "--source")
    refuse_repeated([NamedFile(file, text_field, "--source") for file in files])
    units: list[WorkUnit] = []
    for file in files:
        own = format or format_of(file.name, "--source")
        if own in ID_FORMATS:
            raise UserError(f"--format {own}: ids of a tokenizer, no text; name files of text")
        field_of_text = text_field_of(own, text_field)
        units += cut_units(
            SourceInputs(source="text", files=[file], format=own, text_field=field_of_text)
        )
    return TrainingTexts(
        sources=[TextSource(name="--source", files=files, units=units)],
        max_characters=max_characters,
    )


def texts_of_mixture(mixture: Mixture, max_characters: int) -> TrainingTexts:
    """The training documents of a mixture, in the shares of its weights.

    Raises UserError for a source of ids.
    """
    whole = sum(source.weight for source in mixture.sources)
    sources = []
    named: list[NamedFile] = []
    for source in mixture.sources:
        where = f"{mixture.path}: source {source.name!r}"
        files, format_, _ = source_files(mixture.path.parent, source, where)
        if format_ in ID_FORMATS:
            raise UserError(
                f"{where}: holds ids of a tokenizer, no text; train with a mixture without it"
            )
        text_field = text_field_of(format_, source.text_field)
        inputs = SourceInputs(
            source=source.name,
            files=files,
            format=format_,
            text_field=text_field,
            skip_bad=mixture.skip_bad,
        )
        units = cut_units(inputs)
        share = source.weight / whole
        sources.append(TextSource(name=where, files=files, units=units, share=share))
        if units:
            named += [NamedFile(file, text_field, where) for file in files]
    refuse_repeated(named)
    return TrainingTexts(
        sources=sources,
        max_characters=max_characters,
        validation_fraction=mixture.validation_fraction,
        max_bad_fraction=mixture.max_bad_fraction,
    )


class NamedFile(NamedTuple):
    """A file whose text is learned from."""

    file: InputFile
    text_field: str | None
    where: str  # who names it


def refuse_repeated(named: Sequence[NamedFile]) -> None:
    """Raises UserError if a file's text is there twice, by whatever path of the file."""
    seen: set[tuple[str, str | None]] = set()
    for file, text_field, where in named:
        place = file.url if "://" in file.url else str(Path(file.url).resolve())
        if (place, text_field) in seen:
            raise UserError(f"{where}: {file.name} is named twice; name each file once")
        seen.add((place, text_field))
