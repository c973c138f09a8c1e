"""One work unit to its shards: read, encode, prove, split, append end-of-document ids, write.

The inner loop of `build_shards`. Every core takes a unit of its own through all of this, batch by
batch, with an encoder of its own: nothing waits for anything, and memory holds a batch for each
core. Ids stay in flat arrays all the way. A finished unit leaves a record beside the shards; a
build that was killed takes it from there.
"""

import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.building.ranks import Progress
from data_prep.building.unit_records import (
    LATER_FACTS,
    UnitResult,
    _seal,
    read_record,
    record_path,
    shard_path,
    unit_signature,
    writing,
)
from data_prep.building.validation_split import hash_texts, validation_threshold
from data_prep.errors import UserError
from data_prep.files import digest_file, write_durably
from data_prep.formats.documents import Documents, Reasons, without
from data_prep.formats.flat_arrays import (
    Offsets,
    byte_lengths,
    character_counts,
    large_strings,
)
from data_prep.formats.known import read_documents, refusal
from data_prep.formats.pretokenized import documents as pretokenized
from data_prep.formats.work_unit import WorkUnit
from data_prep.layout import SPLITS
from data_prep.manifest import TokenizerLoss
from data_prep.shards import TOKEN_DTYPE, ShardWriter, Tokens
from data_prep.tokenizer.encode import Encoder, Ids, new_encoder, reference_ids, special_documents
from data_prep.tokenizer.load import LoadedTokenizer
from data_prep.tokenizer.losses import UnitLoss, lost

PARITY_ONE_IN = 1024  # documents, chosen by their hash
PARITY_CHARACTERS = 64 << 10  # of a document, at most
PARITY_MARGIN = 64  # tokens at the end of a document that was cut for the comparison
LONG_DOCUMENT_TOKENS = 512  # from here on copying document by document is the faster way
POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A document that is to be proved."""

    row: int  # in its unit
    text: str
    ids: Ids  # that it got


@dataclass(kw_only=True)
class UnitBuilder:
    """Turns work units into shards; one for each rank."""

    output_dir: Path
    tokenizer: LoadedTokenizer
    prefer: str  # the encoder
    validation_fraction: float
    threads: int

    def __post_init__(self) -> None:
        self.validation_below = validation_threshold(self.validation_fraction)
        # gigatoken's own: this rank's share of the cores
        os.environ.setdefault("RAYON_NUM_THREADS", str(self.threads))
        self.encoder = new_encoder(self.tokenizer, prefer=self.prefer)
        self._encoding = threading.Semaphore(self.threads)  # units that hold a batch
        # which waits for the reference while the next batch is encoded
        self._proving = ThreadPoolExecutor(1)
        self._stopping = threading.Event()

    def build(self, units: Sequence[WorkUnit], progress: Progress) -> dict[str, UnitResult]:
        """Build the units, a core each; what they gave, by record path, once every file of every
        rank is on the disk.

        The first error stops all ranks. It is raised where it was met; the others return nothing.
        """

        def work(unit: WorkUnit) -> UnitResult:
            with writing(self.output_dir, f"unit {unit.name}"):
                return self._build_unit(unit)

        # while a unit waits for the disk, the next is encoded
        with ThreadPoolExecutor(2 * self.threads) as pool:
            futures = {record_path(unit): pool.submit(work, unit) for unit in units}
            try:
                is_whole = watch(
                    {futures[record_path(unit)]: unit.size_bytes for unit in units}, progress
                )
            finally:
                self._stopping.set()
                self._proving.shutdown(wait=False, cancel_futures=True)
                pool.shutdown(cancel_futures=True)
        return {path: future.result() for path, future in futures.items() if is_whole}

    def _build_unit(self, unit: WorkUnit) -> UnitResult:
        signature = unit_signature(unit, self.tokenizer.sha256, self.validation_fraction)
        if (finished := self._finished(unit, signature)) is not None:
            return finished
        with ExitStack() as held:
            with self._encoding:
                writers = (
                    ShardWriter(self.output_dir / shard_path(split, unit), split)
                    for split in SPLITS
                )
                splits = [held.enter_context(closing(writer)) for writer in writers]
                read, loss = self._encode_unit(unit, self.encoder, splits)
            written = tuple(part.finish() for part in splits if part.documents)
        # waits for proofs, while others encode
        result = UnitResult(**read, loss=loss.total(), shards=written)
        content = {
            name: value
            for name, value in asdict(result).items()
            if (name, value) not in LATER_FACTS
        }
        sealed = json.dumps({"seal": _seal(signature, content), **content}, indent=1) + "\n"
        write_durably(self.output_dir / record_path(unit), sealed.encode())
        return result

    def _encode_unit(
        self, unit: WorkUnit, encoder: Encoder, splits: list[ShardWriter]
    ) -> tuple[dict[str, Any], UnitLoss]:
        """Read, encode and write a unit's documents; what `UnitResult` says of them, shards
        aside, and their loss.
        """
        rows, documents_of = [0] * len(unit.files), [0] * len(unit.files)
        empty = row_bytes = bad_bytes = 0
        bad: Reasons = []
        loss = UnitLoss(tokenizer=self.tokenizer)
        for documents in read_documents(unit, self.tokenizer):
            if self._stopping.is_set():
                raise CancelledError
            if len(documents.texts):
                documents = self._encoded(unit, documents, encoder)
            if len(documents.texts):
                self._add(unit, documents, encoder, splits, loss)
            rows[documents.file] += documents.rows_read
            documents_of[documents.file] += len(documents.texts)
            empty += documents.empty
            bad += documents.bad
            row_bytes += documents.row_bytes
            bad_bytes += documents.bad_bytes
        facts = {"rows": sum(rows), "empty_documents": empty, "bad_documents": bad}
        facts |= {"row_bytes": row_bytes, "bad_bytes": bad_bytes}
        if len(unit.parts()) > 1:
            facts |= {"input_rows": tuple(rows), "input_documents": tuple(documents_of)}
        return facts, loss

    def _encoded(self, unit: WorkUnit, documents: Documents, encoder: Encoder) -> Documents:
        """A batch with its ids, without documents whose text gives a special id: they are bad."""
        encoded = documents.encoded or encoder.encode(documents.texts)
        reasons = special_documents(self.tokenizer, *encoded)
        if not reasons:
            return replace(documents, encoded=encoded)
        if not unit.skip_bad:
            first = min(reasons)
            of_file = unit.parts()[documents.file]
            raise refusal(
                of_file, int(documents.rows[first]) - documents.rows_before, reasons[first]
            )
        return without(documents, reasons, encoded)

    def _finished(self, unit: WorkUnit, signature: str) -> UnitResult | None:
        """What an earlier build left of a unit, if it is whole: its record, and files with the
        digests in it.
        """
        result = read_record(self.output_dir / record_path(unit), signature)
        if result is None or (result.bad_documents and not unit.skip_bad):
            return None
        if not self.tokenizer.keeps_all_text and not _has_exact_loss(result):
            return None  # of an earlier version, which counted on few documents
        for shard in result.shards:
            path = self.output_dir / shard_path(shard.split, unit)
            files = {
                path: shard.xxh3_128,
                path.with_name(f"{unit.name}.documents.npy"): shard.index_xxh3_128,
            }
            if not all(
                file.is_file() and digest_file(file) == digest for file, digest in files.items()
            ):
                return None
        return result

    def _add(
        self,
        unit: WorkUnit,
        documents: Documents,
        encoder: Encoder,
        parts: list[ShardWriter],
        loss: UnitLoss,
    ) -> None:
        """Count the loss of a batch and add all of it to their splits; have some proved, at
        least one of a unit.
        """
        ids, offsets = documents.encoded or encoder.encode(documents.texts)
        hashes = hash_texts(documents.texts)
        sample = np.flatnonzero(hashes % PARITY_ONE_IN == 0).tolist()
        if not sample and not any(part.documents for part in parts):
            sample = [int(hashes.argmin())]
        for i in sample:
            own = ids[offsets[i] : offsets[i + 1]].copy()  # a view would keep the batch
            document = Sampled(row=int(documents.rows[i]), text=documents.texts[i].as_py(), ids=own)
            loss.add_proved(self._proving.submit(self._prove, unit, document, encoder))
        loss.add_batch(documents.texts, (ids, offsets), hashes, sample)
        tokens, starts = self._with_eos(ids, offsets, encoder)
        is_validation = hashes < self.validation_below
        lengths = byte_lengths(documents.texts)
        characters = character_counts(documents.texts)
        for part, chosen in zip(parts, (~is_validation, is_validation), strict=True):
            for first, stop in _runs(chosen):
                start = starts[first]
                part.add(
                    tokens[start : starts[stop]],
                    starts[first:stop] - start,
                    documents.rows[first:stop],
                )
            part.text_bytes += int(lengths[chosen].sum())
            part.text_characters += int(characters[chosen].sum())

    def _with_eos(self, ids: Ids, offsets: Offsets, encoder: Encoder) -> tuple[Tokens, Offsets]:
        """Shard tokens of a batch, and the start of each document in them (documents + 1)."""
        if len(ids) and ids.max() >= self.tokenizer.vocab_size:
            raise UserError(
                f"{encoder.name} gave id {ids.max()}, beyond the vocabulary; use --encoder "
                "tokenizers"
            )
        return ended(ids, offsets, self.tokenizer.eos_id), offsets + np.arange(len(offsets))

    def _prove(self, unit: WorkUnit, document: Sampled, encoder: Encoder) -> TokenizerLoss:
        """Compare a document with the reference; what the tokenizer lost of it.

        Raises UserError naming the document if the ids differ.
        """
        is_import = unit.format in pretokenized.FORMATS
        text, got = document.text, document.ids
        is_cut = len(text) > PARITY_CHARACTERS
        text = text[:PARITY_CHARACTERS]
        is_proved = encoder.is_reference and not is_import and not is_cut
        expected = got if is_proved else reference_ids(self.tokenizer, text)
        loss = lost(self.tokenizer, text, expected)
        if encoder.is_reference and not is_import:
            return loss
        if is_cut and is_import:
            expected = expected[:-PARITY_MARGIN]
            got = got[: len(expected)]
        elif is_cut:  # the whole document's ids may differ far before the cut
            got, _ = encoder.encode(large_strings([text.encode()]))
        if not np.array_equal(got, expected):
            problem = (
                f"{encoder.name} and tokenizers give different ids; build with --encoder tokenizers"
            )
            if is_import:
                own = f"its ids are not what {self.tokenizer.directory} gives for their text"
                problem = f"{own}; name the tokenizer that made them"
            raise UserError(
                f"{unit.url}: document in row {document.row} of unit {unit.name}: {problem}"
            )
        return loss


def watch(pending_bytes: dict[Future[UnitResult], int], progress: Progress) -> bool:
    """Report progress until every rank is done, or one has met an error: then raise it, if it is
    ours, or say False.
    """
    states = {"working"}
    while "working" in states and "failed" not in states:
        finished, _ = wait(pending_bytes, POLL_SECONDS, FIRST_EXCEPTION)
        has_failed = any(future.exception() for future in finished)
        done_bytes = sum(map(pending_bytes.pop, finished))
        states = progress.report(
            "failed" if has_failed else "working" if pending_bytes else "done", done_bytes
        )
        for future in finished:
            future.result()
    progress.bar.close()
    return "failed" not in states


def _has_exact_loss(result: UnitResult) -> bool:
    """Whether the loss was counted in all documents, not only in the sampled ones."""
    tokens = sum(shard.tokens - shard.documents for shard in result.shards)
    return result.loss is not None and result.loss.tokens == tokens


def ended(ids: Ids, offsets: Offsets, eos_id: int) -> Tokens:
    """The ids of documents, each with an end-of-document id behind it."""
    documents = len(offsets) - 1
    if len(ids) < LONG_DOCUMENT_TOKENS * documents:
        return np.insert(ids.astype(TOKEN_DTYPE), offsets[1:], eos_id)
    # of long documents this takes half the time
    tokens = np.full(len(ids) + documents, eos_id, TOKEN_DTYPE)
    for number, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        tokens[start + number : stop + number] = ids[start:stop]
    return tokens


def _runs(chosen: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that are chosen."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).tolist()
    return zip(edges[::2], edges[1::2], strict=True)
