"""Prompts: texts to be continued, as ids. No torch: they are looked at before a model is loaded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from data_prep.errors import UserError, explained, one_line, parse_json

LONGEST_QUOTE = 40  # characters of a prompt that is refused
JSON_LINES = (".jsonl", ".ndjson", ".json")
FORM = 'each line is an object with the text under "prompt"'


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to be continued."""

    text: str
    ids: tuple[int, ...]  # at least one, and no more than a model sees


def quoted(text: str) -> str:
    """The beginning of a prompt, for a message."""
    beginning = text[:LONGEST_QUOTE]
    dots = "..." if len(text) > LONGEST_QUOTE else ""
    return repr(beginning + dots)


def encode_prompt(text: str, tokenizer: Tokenizer, seq_len: int, where: str) -> Prompt:
    """A prompt's ids, as it has them in the data: text that spells a special token is text.

    Raises UserError for one that has none, or more than `seq_len`, which a model sees at once.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # as JSON may spell it, or a command line has a byte that is none
        raise UserError(
            f"{where}: {quoted(text)} is no text in UTF-8 (it holds half of a surrogate pair); "
            "give other text"
        ) from None
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    # What its tokenizer has no id for.
    except Exception as error:
        raise UserError(
            f"{where}: {quoted(text)} can't be encoded ({one_line(error)}); give other text"
        ) from None
    if not ids:
        raise UserError(
            f"{where}: {quoted(text)} gives no token, and there is nothing to continue; give some "
            "text"
        )
    if len(ids) > seq_len:
        raise UserError(
            f"{where}: {quoted(text)} has {len(ids):,} tokens, and the model sees {seq_len:,} "
            "(model.seq_len); make it shorter"
        )
    return Prompt(text=text, ids=tuple(ids))


def encode_prompts(
    texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, where: str
) -> tuple[Prompt, ...]:
    """Several prompts; a UserError numbers them from 1."""
    return tuple(
        encode_prompt(text, tokenizer, seq_len, f"{where} {number}")
        for number, text in enumerate(texts, start=1)
    )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a line of text each or, in JSON lines, an object with a `prompt`.

    Empty lines of text are none. Raises UserError for a file that holds none, or something else.
    """
    where = f"--prompts {path}"
    if path.is_dir():
        raise UserError(f"{where}: is a directory; give a file of prompts, a line each")
    with explained(UnicodeDecodeError, f"{where}: is no text in UTF-8", "convert it"):
        text = path.read_bytes().decode("utf-8-sig")
    # Not by splitlines(), which would also split within a line.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if path.suffix in JSON_LINES:
        prompts = list(from_json_lines(lines, where))
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{where}: holds no prompt; write one a line")
    return prompts


def from_json_lines(lines: Iterable[str], where: str) -> Iterator[str]:
    """The prompt of each line that is not empty. Raises UserError for one that has none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        content = parse_json(line, f"{where}: line {number}", FORM)
        prompt = content.get("prompt") if isinstance(content, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f"{where}: line {number}: has no prompt; {FORM}")
        yield prompt
