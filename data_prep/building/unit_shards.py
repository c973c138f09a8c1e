"""One work unit to its shards: read, encode, prove, split, append end-of-document ids, write.

The inner loop of `build_shards`. Every core takes a unit of its own through all of this, batch by
batch, and memory holds a batch for each core. The threads of a process share one encoder, and what
proves the ids of a unit comes in while the next ones are encoded. Ids stay in flat arrays all the
way. A finished unit leaves a record beside the shards; a build that was killed takes it from there.
"""

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_prep.building.proofs import PARITY_ONE_IN, Prover, Sampled
from data_prep.building.ranks import Progress
from data_prep.building.unit_records import (
    UnitResult,
    read_record,
    record_path,
    shard_path,
    unit_signature,
    write_record,
    writing,
)
from data_prep.building.validation_split import hash_texts, validation_threshold
from data_prep.errors import UserError
from data_prep.files import digest_file
from data_prep.formats.documents import Documents, Reasons, without
from data_prep.formats.flat_arrays import Mask, Offsets, byte_lengths, character_counts
from data_prep.formats.known import read_documents, refusal
from data_prep.formats.work_unit import WorkUnit
from data_prep.layout import SPLITS
from data_prep.manifest import ShardFacts
from data_prep.shards import TOKEN_DTYPE, Index, ShardWriter, Tokens
from data_prep.tokenizer.encode import Encoded, Ids, new_encoder, special_documents
from data_prep.tokenizer.load import LoadedTokenizer
from data_prep.tokenizer.losses import UnitLoss

LONG_DOCUMENT_TOKENS = 512  # from here on copying document by document is the faster way
POLL_SECONDS = 0.1


@dataclass(kw_only=True)
class UnitInWork:
    """A unit that is being built, and what was read of it so far."""

    unit: WorkUnit
    writers: list[ShardWriter]  # of the splits, in the order of SPLITS
    loss: UnitLoss
    rows: list[int] = field(init=False)  # of each of its files
    documents: list[int] = field(init=False)  # of each of its files
    empty: int = 0
    bad: Reasons = field(default_factory=list)
    row_bytes: int = 0
    bad_bytes: int = 0

    def __post_init__(self) -> None:
        self.rows = [0] * len(self.unit.files)
        self.documents = [0] * len(self.unit.files)

    def count(self, documents: Documents) -> None:
        """Count a batch, without the documents that are left out of it."""
        self.rows[documents.file] += documents.rows_read
        self.documents[documents.file] += len(documents.texts)
        self.empty += documents.empty
        self.bad += documents.bad
        self.row_bytes += documents.row_bytes
        self.bad_bytes += documents.bad_bytes

    def result(self, shards: tuple[ShardFacts, ...]) -> UnitResult:
        """What the unit gave, once its shards are written; this waits for proofs."""
        has_rows_of_files = len(self.unit.parts()) > 1
        return UnitResult(
            rows=sum(self.rows),
            empty_documents=self.empty,
            bad_documents=self.bad,
            shards=shards,
            loss=self.loss.total(),
            input_rows=tuple(self.rows) if has_rows_of_files else (),
            input_documents=tuple(self.documents) if has_rows_of_files else (),
            row_bytes=self.row_bytes,
            bad_bytes=self.bad_bytes,
        )


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
        # This rank's share of the cores, for gigatoken's own threads.
        os.environ.setdefault("RAYON_NUM_THREADS", str(self.threads))
        self.encoder = new_encoder(self.tokenizer, prefer=self.prefer)
        self._prover = Prover(self.tokenizer, self.encoder)
        self._encoding = threading.Semaphore(self.threads)  # units that hold a batch
        self._stopping = threading.Event()

    def build(self, units: Sequence[WorkUnit], progress: Progress) -> dict[str, UnitResult]:
        """Build the units, a core each.

        Returns what they gave, by record path, once every file of every rank is on the disk. The
        first error stops all ranks. It is raised where it was met; the others return nothing.
        """

        def work(unit: WorkUnit) -> UnitResult:
            with writing(self.output_dir, f"unit {unit.name}"):
                return self._build_unit(unit)

        # While a unit waits for the disk, the next is encoded.
        with ThreadPoolExecutor(2 * self.threads) as pool:
            futures: dict[str, Future[UnitResult]] = {}
            pending_bytes: dict[Future[UnitResult], int] = {}
            for unit in units:
                future = pool.submit(work, unit)
                futures[record_path(unit)] = future
                pending_bytes[future] = unit.size_bytes
            try:
                is_whole = watch(pending_bytes, progress)
            finally:
                self._stopping.set()
                self._prover.shutdown()
                pool.shutdown(cancel_futures=True)
        if not is_whole:
            return {}
        return {path: future.result() for path, future in futures.items()}

    def _build_unit(self, unit: WorkUnit) -> UnitResult:
        """Build a unit, if no earlier build has."""
        signature = unit_signature(unit, self.tokenizer.sha256, self.validation_fraction)
        finished = self._finished(unit, signature)
        if finished is not None:
            return finished
        with ExitStack() as held:
            with self._encoding:
                writers = []
                for split in SPLITS:
                    writer = ShardWriter(self.output_dir / shard_path(split, unit), split)
                    writers.append(held.enter_context(closing(writer)))
                loss = UnitLoss(tokenizer=self.tokenizer)
                work = UnitInWork(unit=unit, writers=writers, loss=loss)
                self._encode_unit(work)
            written = tuple(writer.finish() for writer in writers if writer.documents)
        # This waits for proofs, while other units are encoded.
        result = work.result(written)
        write_record(self.output_dir / record_path(unit), signature, result)
        return result

    def _finished(self, unit: WorkUnit, signature: str) -> UnitResult | None:
        """What an earlier build left of a unit, if it is whole.

        That is its record, and files with the digests in it.
        """
        result = read_record(self.output_dir / record_path(unit), signature)
        if result is None or (result.bad_documents and not unit.skip_bad):
            return None
        if not self.tokenizer.keeps_all_text and not result.has_exact_loss:
            return None  # of an earlier version, which counted on few documents
        for shard in result.shards:
            path = self.output_dir / shard_path(shard.split, unit)
            index_path = path.with_name(f"{unit.name}.documents.npy")
            digests = {path: shard.xxh3_128, index_path: shard.index_xxh3_128}
            for file, digest in digests.items():
                if not file.is_file() or digest_file(file) != digest:
                    return None
        return result

    def _encode_unit(self, work: UnitInWork) -> None:
        """Read, encode and write a unit's documents."""
        for documents in read_documents(work.unit, self.tokenizer):
            if self._stopping.is_set():
                raise CancelledError
            if len(documents.texts):
                encoded = documents.encoded or self.encoder.encode(documents.texts)
                documents = self._without_special(work.unit, documents, encoded)
            if documents.encoded and len(documents.texts):
                self._add(work, documents, documents.encoded)
            work.count(documents)

    def _without_special(self, unit: WorkUnit, documents: Documents, encoded: Encoded) -> Documents:
        """A batch with its ids, without documents whose text gives a special id: they are bad.

        Raises UserError for the first of these, unless the unit says to leave bad ones out.
        """
        ids, offsets = encoded
        reasons = special_documents(self.tokenizer, ids, offsets)
        if not reasons:
            return replace(documents, encoded=encoded)
        if not unit.skip_bad:
            first = min(reasons)
            of_file = unit.parts()[documents.file]
            row = int(documents.rows[first]) - documents.rows_before
            raise refusal(of_file, row, reasons[first])
        return without(documents, reasons, encoded)

    def _add(self, work: UnitInWork, documents: Documents, encoded: Encoded) -> None:
        """Add a batch to the shards of its splits, counted and some of it proved."""
        ids, offsets = encoded
        self._check_ids(ids)
        hashes = hash_texts(documents.texts)
        self._sample(work, documents, encoded, hashes)
        tokens = ended(ids, offsets, self.tokenizer.eos_id)
        # Before each document lie the end-of-document ids of those before it.
        starts = offsets + np.arange(len(offsets))
        is_validation = hashes < self.validation_below
        lengths = byte_lengths(documents.texts)
        characters = character_counts(documents.texts)
        for writer, chosen in zip(work.writers, (~is_validation, is_validation), strict=True):
            for first, stop in _runs(chosen):
                start = starts[first]
                writer.add(
                    tokens[start : starts[stop]],
                    starts[first:stop] - start,
                    documents.rows[first:stop],
                )
            writer.text_bytes += int(lengths[chosen].sum())
            writer.text_characters += int(characters[chosen].sum())

    def _check_ids(self, ids: Ids) -> None:
        """Raise UserError for an id that the vocabulary lacks."""
        if len(ids) and ids.max() >= self.tokenizer.vocab_size:
            given = f"{self.encoder.name} gave id {ids.max()}"
            raise UserError(f"{given}, beyond the vocabulary; use --encoder tokenizers")

    def _sample(
        self, work: UnitInWork, documents: Documents, encoded: Encoded, hashes: Index
    ) -> None:
        """Have some of a batch proved, at least one document of a unit; count the loss of all."""
        ids, offsets = encoded
        sample = np.flatnonzero(hashes % PARITY_ONE_IN == 0).tolist()
        is_first_batch = not any(writer.documents for writer in work.writers)
        if is_first_batch and not sample:
            sample = [int(hashes.argmin())]
        for i in sample:
            document = Sampled(
                row=int(documents.rows[i]),
                text=documents.texts[i].as_py(),
                ids=ids[offsets[i] : offsets[i + 1]].copy(),  # a view would keep the batch
            )
            work.loss.add_proved(self._prover.submit(work.unit, document))
        work.loss.add_batch(documents.texts, encoded, hashes, sample)


def watch(pending_bytes: dict[Future[UnitResult], int], progress: Progress) -> bool:
    """Report progress until every rank is done, or one has met an error.

    Raises an error of this rank. Returns whether all units of all ranks are built.
    """
    states = {"working"}
    while "working" in states and "failed" not in states:
        finished, _ = wait(pending_bytes, POLL_SECONDS, FIRST_EXCEPTION)
        done_bytes = sum(pending_bytes.pop(future) for future in finished)
        state = "working" if pending_bytes else "done"
        if any(future.exception() for future in finished):
            state = "failed"
        states = progress.report(state, done_bytes)
        for future in finished:
            future.result()
    progress.bar.close()
    return "failed" not in states


def ended(ids: Ids, offsets: Offsets, eos_id: int) -> Tokens:
    """The ids of documents, each with an end-of-document id behind it."""
    documents = len(offsets) - 1
    if len(ids) < LONG_DOCUMENT_TOKENS * documents:
        return np.insert(ids.astype(TOKEN_DTYPE), offsets[1:], eos_id)
    # Of long documents this takes half the time.
    tokens = np.full(len(ids) + documents, eos_id, TOKEN_DTYPE)
    for number, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        tokens[start + number : stop + number] = ids[start:stop]
    return tokens


def _runs(chosen: Mask) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that are chosen."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).tolist()
    return zip(edges[::2], edges[1::2], strict=True)
