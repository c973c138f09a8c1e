"""Proofs: some documents of every unit get their ids from the reference too, and must agree.

Of imported ids, that the text they stand for has these ids by the tokenizer of the mixture.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_prep.errors import UserError
from data_prep.formats.flat_arrays import large_strings
from data_prep.formats.pretokenized.documents import ID_FORMATS
from data_prep.formats.work_unit import WorkUnit
from data_prep.manifest import TokenizerLoss
from data_prep.tokenizer.encode import Encoder, Ids, reference_ids
from data_prep.tokenizer.load import LoadedTokenizer
from data_prep.tokenizer.losses import lost

PARITY_ONE_IN = 1024  # documents, chosen by their hash
PARITY_CHARACTERS = 64 << 10  # of a document, at most
PARITY_MARGIN = 64  # tokens at the end of a document that was cut for the comparison


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A document that is to be proved."""

    row: int  # in its unit
    text: str
    ids: Ids  # that it got


class Prover:
    """Proves documents one by one, beside the threads that encode.

    Its thread waits for the reference, which another process runs, while the next batch is encoded.
    """

    def __init__(self, tokenizer: LoadedTokenizer, encoder: Encoder) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self._pool = ThreadPoolExecutor(1)

    def submit(self, unit: WorkUnit, document: Sampled) -> Future[TokenizerLoss]:
        """Have a document proved; its result is what the tokenizer lost of it, or the error."""
        return self._pool.submit(self.prove, unit, document)

    def shutdown(self) -> None:
        """Prove nothing more; what is being proved just now is left to itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def prove(self, unit: WorkUnit, document: Sampled) -> TokenizerLoss:
        """Compare a document with the reference; what the tokenizer lost of it.

        Raises UserError naming the document if the ids differ.
        """
        is_import = unit.format in ID_FORMATS
        is_by_reference = self.encoder.is_reference and not is_import
        is_cut = len(document.text) > PARITY_CHARACTERS
        text = document.text[:PARITY_CHARACTERS]
        if is_by_reference and not is_cut:
            expected = document.ids
        else:
            expected = reference_ids(self.tokenizer, text)
        loss = lost(self.tokenizer, text, expected)
        if is_by_reference:
            return loss
        got = document.ids
        if is_cut and is_import:
            # Where the text is cut a token may be, too: its last ones are others.
            expected = expected[:-PARITY_MARGIN]
            got = got[: len(expected)]
        elif is_cut:
            # The whole document's ids may differ far before the cut.
            got, _ = self.encoder.encode(large_strings([text.encode()]))
        if not np.array_equal(got, expected):
            problem = self._difference_of_imports() if is_import else self._difference_of_encoders()
            place = f"document in row {document.row} of unit {unit.name}"
            raise UserError(f"{unit.url}: {place}: {problem}")
        return loss

    def _difference_of_imports(self) -> str:
        own = f"its ids are not what {self.tokenizer.directory} gives for their text"
        return f"{own}; name the tokenizer that made them"

    def _difference_of_encoders(self) -> str:
        names = f"{self.encoder.name} and tokenizers"
        return f"{names} give different ids; build with --encoder tokenizers"
