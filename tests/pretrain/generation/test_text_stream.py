"""Streamed text: whole characters, and together what decoding all at once gives."""

from pathlib import Path

import pytest
from support.kinds_of_tokenizers import KINDS, write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pretrain.data.tokenizer import open_tokenizer
from pretrain.generation.text_stream import TextStream

HARD = "Zoë\u2019s naïve café — 日本語 👩‍👩‍👧 ok\n\n  two  spaces\tand a tab 🇩🇪 ﷺ"


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, so that most characters come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces_of(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, before)
    return [*[stream.add(new_id) for new_id in ids], stream.finish()]


def test_a_character_in_parts_is_held_back_until_it_is_whole() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a👧b").ids
    assert len(ids) == 6
    assert pieces_of(tokenizer, [], ids) == ["a", "", "", "", "👧", "b", ""]


def test_what_never_becomes_whole_is_given_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a👧").ids[:-1]
    assert pieces_of(tokenizer, [], ids) == ["a", "", "", "", "\ufffd"]


def test_bytes_that_are_no_character_hold_up_nothing_that_follows() -> None:
    tokenizer = byte_tokenizer()
    torn = tokenizer.encode("👧").ids[1:2]
    ids = [*torn, *tokenizer.encode("b").ids, *torn, *torn, *tokenizer.encode("cd").ids]
    pieces = pieces_of(tokenizer, [], ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces == ["", "\ufffdb", "", "", "\ufffd\ufffdc", "d", ""]


@pytest.mark.parametrize(
    "kind", ["plain", "space before", "metaspace", "llama", "unigram", "wordpiece", "bert", "words"]
)
def test_the_pieces_together_are_the_text_for_all_kinds_of_tokenizers(
    kind: str, tmp_path: Path
) -> None:
    directory = write_tokenizer(tmp_path / "tokenizer", KINDS[kind], [HARD] * 20)
    tokenizer = open_tokenizer(directory)
    ids = tokenizer.encode(HARD, add_special_tokens=False).ids
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    for cut in (0, 1, len(ids) // 2, len(ids) - 1):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=False)
        if not whole.startswith(before):
            continue  # cut within a character
        assert before + "".join(pieces_of(tokenizer, ids[:cut], ids[cut:])) == whole
