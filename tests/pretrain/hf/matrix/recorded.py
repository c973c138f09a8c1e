"""What exports were run in, as pretrain/hf/engines.yaml and the tables of pretrain/README.md have
it; tests/benchmarks/engines.py writes them.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from support.house_figures import docstring_lines
from support.runs import REPOSITORY

from pretrain.hf.engines import ENGINES_FILE, EngineRecord, read_engine_records
from pretrain.modeling_tablefree import INPUT_EMBEDDINGS

COMMAND = "python tests/benchmarks/engines.py --record"
HEADER = f"""\
# What small exports were run in; the card of an export shows the rows of its form and input code,
# pretrain/README.md all. Not written by hand: {COMMAND}
"""
CODES = INPUT_EMBEDDINGS
FORMS = ("tablefree", "gpt_neox", "gguf")
README = REPOSITORY / "pretrain" / "README.md"
ROWS_TABLE = f"<!-- {COMMAND} --only transformers -->"
ENGINES_TABLE = f"<!-- {COMMAND} -->"
TABLE_ENDS = "<!-- end of the record -->"
DIGITS = 12


def code_digest(path: Path) -> str:
    """A digest of a Python file without comments, docstrings and empty lines."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    said = docstring_lines(ast.walk(ast.parse(source)))
    code = [line.rstrip() for row, line in enumerate(lines, 1) if row not in said]
    text = "\n".join(line for line in code if line)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def place(record: EngineRecord) -> tuple[bool, str]:
    """Where a record stands: transformers first, then by name."""
    return record.engine != "transformers", record.engine.lower()


def replace_records(new: Sequence[EngineRecord], path: Path = ENGINES_FILE) -> None:
    """Put new records in the place of all that the file has of the same engines."""
    engines = {record.engine for record in new}
    kept = [old for old in read_engine_records(path) if old.engine not in engines]
    content = [asdict(record) for record in sorted([*kept, *new], key=place)]
    path.write_text(HEADER + yaml.safe_dump(content, sort_keys=False, width=1000), encoding="utf-8")


def recorded_table(readme: Path, begins: str) -> str:
    """A table as the README has it between two comments."""
    text = readme.read_text(encoding="utf-8")
    return text.partition(begins)[2].partition(TABLE_ENDS)[0].strip()


def write_table(readme: Path, begins: str, table: str) -> None:
    """Put a table between its two comments."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(begins)
    _, _, after = rest.partition(TABLE_ENDS)
    readme.write_text(f"{before}{begins}\n\n{table}\n\n{TABLE_ENDS}{after}", encoding="utf-8")


def verdict(record: EngineRecord | None, notes: list[str]) -> str:
    """A cell: what a form came to with all input codes; what went wrong is added to the notes."""
    if record is None:
        return ""
    by_word: dict[str, list[str]] = {}
    for code, error in record.errors.items():
        if error is not None and error not in notes:
            notes.append(error)
        word = "yes" if error is None else f"no ({notes.index(error) + 1})"
        by_word.setdefault(word, []).append(code)
    if len(by_word) == 1 and tuple(record.errors) == CODES:
        return next(iter(by_word))
    return "; ".join(f"{word}: {', '.join(codes)}" for word, codes in by_word.items())


def engines_table(records: Sequence[EngineRecord]) -> str:
    """The table of all engines, a row for each release."""
    rows: dict[tuple[str, str, str], dict[str, EngineRecord]] = {}
    for record in records:
        key = (record.engine, record.version, record.tried)
        rows.setdefault(key, {})[record.form] = record
    notes: list[str] = []
    lines = [
        f"| engine | release | tried | {' | '.join(f'`{form}`' for form in FORMS)} |",
        "|---" * (3 + len(FORMS)) + "|",
    ]
    for key, by_form in rows.items():
        cells = [verdict(by_form.get(form), notes) for form in FORMS]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    if notes:
        lines.append("")
        lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines)
