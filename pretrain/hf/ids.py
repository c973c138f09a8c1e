"""Whether an export's tokenizer gives the ids of the data, as whoever loads the export gets it: by
`AutoTokenizer`.

Asked when an export is made, of documents of every source of the data set where it is at hand, and
of texts that are hard to tokenize in any case; and again by `export_hf --check`, with the
transformers that is installed then.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.errors import UserError, explained
from data_prep.manifest import Shard
from data_prep.shards import ShardReader

# Of all sources together, but at least one of each: it takes 2 seconds for a million tokens.
SAMPLED_DOCUMENTS = 512
OF_A_SOURCE = 16
SAMPLED_TOKENS = 2_000  # of a document, from its beginning
ADVICE = "use transformers 4.57 or newer, or report it"
HARD_TEXTS = (
    "Fellow citizens",
    "  two  spaces\n\nand a line \t\r\n",
    " leading, trailing ",
    "1 12 123 1234 12345.67 2026-11-29 v1.2.3 0x1F",
    "don't DON'T they'll we've I'm she'd rock'n'roll",
    "def f(x):\n\treturn {'a': x ** 2}  # comment\n\n\n",
    "e\u0301 \u00e9 \ufb01 \uff21 \u2460 \u0130 \u00df na\u00efve",
    "\u65e5\u672c\u8a9e \u0627\u0644\u0639\u0631\u0628\u064a\u0629 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \uac00\ub098",
    "\U0001f642\u200d\u2194\ufe0f \U0001f1e9\U0001f1ea \u00a0\u2003\u3000\u200b \ufeff",
    "hello , world ! isn 't it ? a . b",
    "...!!!???--- ~~~ ((())) [[]] <<>> //\\\\",
)


def texts_of_every_source(reader: ShardReader, tokenizer: Tokenizer) -> Iterator[str]:
    """Documents of a data set, as their ids decode, evenly spread over each of its sources; of a
    long one a part.
    """
    sources = reader.manifest.sources
    of_each = max(1, min(OF_A_SOURCE, SAMPLED_DOCUMENTS // len(sources)))
    for source in sources:
        shards = [shard for shard in reader.manifest.shards if shard.source == source.name]
        total = sum(shard.documents for shard in shards)
        count = min(of_each, total)
        wanted = [number * total // of_each for number in range(count)]
        before = 0  # documents in the source's shards so far
        for shard in shards:
            past_last = before + shard.documents
            for number in wanted:
                if before <= number < past_last:
                    yield beginning(reader, shard, number - before, tokenizer)
            before = past_last


def beginning(reader: ShardReader, shard: Shard, document: int, tokenizer: Tokenizer) -> str:
    """The text that the first SAMPLED_TOKENS ids of a document decode to, without its end."""
    place, _ = reader.document(shard, document)
    end_of_text = place.stop - 1  # the last id ends the document
    ids = reader.tokens(shard)[place.start : min(end_of_text, place.start + SAMPLED_TOKENS)]
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that tokenizers read differently: those above, all tokens of the vocabulary, special
    tokens spelled out.
    """
    every_id = list(range(tokenizer.get_vocab_size()))
    every_token = tokenizer.decode(every_id, skip_special_tokens=True)
    added = tokenizer.get_added_tokens_decoder().values()
    named = [f"a {token.content} b{token.content}" for token in added]
    return [*HARD_TEXTS, every_token, *named]


def check_ids(export: Path, expected: Tokenizer, texts: Iterable[str], place: Path) -> int:
    """AutoTokenizer, without code from elsewhere, must give these ids for texts; returns how many
    texts it was asked.

    `export` is a whole export, for which class AutoTokenizer takes hangs on its config.json too;
    `place` is what it is called. Special tokens in a text are text here, as in the data. Raises
    UserError for the first text with other ids.
    """
    from transformers import AutoTokenizer, __version__

    refused = f"{place}: transformers {__version__} can't load or use the exported tokenizer"
    with transformers_unheard(), explained(Exception, refused, ADVICE):
        exported: Any = AutoTokenizer.from_pretrained(
            export, local_files_only=True, trust_remote_code=False
        )
        asked = 0
        for text in texts:
            asked += 1
            ids = expected.encode(text, add_special_tokens=False).ids
            if exported.encode(text, split_special_tokens=True) != ids:
                problem = "would give other ids with the exported tokenizer than the data set holds"
                raise UserError(
                    f"{place}: transformers {__version__} {problem}, as for {text[:40]!r}; {ADVICE}"
                )
        return asked


@contextlib.contextmanager
def transformers_unheard() -> Iterator[None]:
    """transformers says nothing below an error: it would warn of long texts, and of a class whose
    code is not to be run.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
