"""What a tokenizer loses of a work unit's text: unk counted in all of it, documents that change on
a sample.

Of a tokenizer that keeps all text, only the documents that are proved anyway are looked at. Of any
other one, unk is counted exactly, and at least LEAST_SAMPLE documents of a unit are decoded: the
share of few is a matter of luck.
"""

import bisect
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from data_prep.manifest import NO_LOSS, TokenizerLoss
from data_prep.shards import Index
from data_prep.tokenizer.encode import Encoded, Ids, reference_ids
from data_prep.tokenizer.load import LoadedTokenizer

LEAST_SAMPLE = 64  # documents of a unit, or all where it has fewer; those of the lowest hashes
SAMPLE_CHARACTERS = 64 << 10  # of a document, at most


def lost(tokenizer: LoadedTokenizer, text: str, ids: Ids) -> TokenizerLoss:
    """What the tokenizer lost of one document."""
    unknown = (
        0 if tokenizer.unknown_id is None else int(np.count_nonzero(ids == tokenizer.unknown_id))
    )
    is_changed = tokenizer.by_reference.decode(ids.tolist()) != text
    return TokenizerLoss(
        documents=1, tokens=len(ids), unknown_tokens=unknown, changed_documents=int(is_changed)
    )


@dataclass(order=True, frozen=True)
class Candidate:
    """A document that may belong to the sample."""

    hash: int
    number: int  # in its unit: of equal texts the first counts
    text: str = field(compare=False)  # its beginning, if it is long
    ids: Ids | None = field(compare=False)  # None if only the beginning's count


@dataclass(kw_only=True)
class UnitLoss:
    """Counts the loss of a unit, batch by batch; the same whatever the batches are."""

    tokenizer: LoadedTokenizer
    proved: list[Future[TokenizerLoss]] = field(default_factory=list)
    tokens: int = 0
    unknown_tokens: int = 0
    documents: int = 0
    lowest: list[Candidate] = field(default_factory=list)  # in order

    def add_proved(self, loss: Future[TokenizerLoss]) -> None:
        """The loss of a document, once it is compared with the reference."""
        self.proved.append(loss)

    def add_batch(
        self, texts: pa.LargeStringArray, encoded: Encoded, hashes: Index, proved: list[int]
    ) -> None:
        """Count all of a batch, and keep what may belong to the sample; the documents `proved`
        are in it already.
        """
        if self.tokenizer.keeps_all_text:
            return
        ids, offsets = encoded
        self.tokens += len(ids)
        if self.tokenizer.unknown_id is not None:
            self.unknown_tokens += int(np.count_nonzero(ids == self.tokenizer.unknown_id))
        others = np.setdiff1d(np.arange(len(texts)), proved)
        for i in others[np.argsort(hashes[others], kind="stable")][:LEAST_SAMPLE].tolist():
            if len(self.lowest) == LEAST_SAMPLE and int(hashes[i]) >= self.lowest[-1].hash:
                break
            text = texts[i].as_py()
            is_cut = len(text) > SAMPLE_CHARACTERS
            # a view would keep the batch
            own = None if is_cut else ids[offsets[i] : offsets[i + 1]].copy()
            number = self.documents + i
            bisect.insort(
                self.lowest, Candidate(int(hashes[i]), number, text[:SAMPLE_CHARACTERS], own)
            )
            del self.lowest[LEAST_SAMPLE:]
        self.documents += len(texts)

    def total(self) -> TokenizerLoss:
        """What was lost of the unit. Raises what a comparison with the reference raised."""
        loss = sum((proof.result() for proof in self.proved), NO_LOSS)
        if self.tokenizer.keeps_all_text:
            return loss
        for some in self.lowest:
            ids = reference_ids(self.tokenizer, some.text) if some.ids is None else some.ids
            loss += lost(self.tokenizer, some.text, ids)
        return replace(loss, tokens=self.tokens, unknown_tokens=self.unknown_tokens)
