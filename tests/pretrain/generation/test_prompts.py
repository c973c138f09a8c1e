"""Prompts: their ids are those of the data, and what is none is refused in one line."""

from pathlib import Path

import pytest
from support.kinds_of_tokenizers import KINDS, write_tokenizer
from tokenizers import Tokenizer

from data_prep.errors import UserError
from pretrain.data.tokenizer import open_tokenizer
from pretrain.generation.prompts import encode_prompt, encode_prompts, read_prompts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    home = tmp_path_factory.mktemp("tokenizer")
    # One that would add a template's tokens, which the data does not have.
    return open_tokenizer(write_tokenizer(home / "t", KINDS["template"], ["some plain text"] * 9))


def test_no_token_is_added_and_special_ones_are_text(tokenizer: Tokenizer) -> None:
    prompt = encode_prompt("some</s>text", tokenizer, 100, "--prompt")
    assert tokenizer.decode(list(prompt.ids), skip_special_tokens=True) == "some</s>text"


def test_an_empty_prompt_and_a_long_one_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"log.prompts 2: '' gives no token.*give some text"):
        encode_prompts(["a", ""], tokenizer, 8, "log.prompts")
    with pytest.raises(UserError, match=r"'abab.*\.\.\.' has \d+ tokens, and the model sees 8 "):
        encode_prompt("ab" * 200, tokenizer, 8, "--prompt")
    with pytest.raises(
        UserError, match=r"is no text in UTF-8 \(it holds half of a surrogate pair\)"
    ):
        encode_prompt("half a pair \udc80", tokenizer, 8, "--prompt")


def test_a_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n two \u2028 with a separator\nthree".encode())
    assert read_prompts(path) == ["one", " two \u2028 with a separator", "three"]


def test_json_lines_have_it_under_a_key(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\\ntwo", "id": 3}\n\n{"prompt": "three"}\n')
    assert read_prompts(path) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"\n\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "is no text in UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2: has no prompt"),
        ("p.jsonl", b"[1]\n", "line 1: has no prompt"),
        ("p.jsonl", b"{\n", "line 1: not valid JSON"),
        ("p.jsonl", b"", "holds no prompt"),
    ],
)
def test_another_file_is_refused(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as refused:
        read_prompts(path)
    assert str(path) in str(refused.value)
