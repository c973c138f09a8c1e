"""The project as somebody installs it: from its folder, with the newest of all that it allows.

The other tests run with the versions of .ci/constraints.txt, so they say nothing of a release that
comes tomorrow.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.environments import make_environment, python_of, skip_without_registry
from support.prep_helpers import source, write_jsonl, write_mixture
from support.runs import REPOSITORY, TINY_VOCAB_SIZE, environment, losses, write_recipe

STEPS = 2
NOT_SOURCES = (
    ".git",
    ".venv",
    "runs",
    "build",
    "dist",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
)
TEXTS = [
    f"Number {n} comes after {n - 1} and before {n + 1}; there is no more to say of {n}."
    for n in range(400)
]
GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer("Number 7", return_tensors="pt")
output = model.generate(**prompt, min_new_tokens=3, max_new_tokens=3)
print(len(output[0]) - len(tokenizer("Number 7")["input_ids"]))
"""

PACKAGES = ("data_prep", "pretrain", "launch", "ds_configs")
# They install a checkout, and what they start lies in one.
FOR_A_CHECKOUT = (
    "launch/demo/",
    "launch/quickstart.sh",
    "launch/shell/install.sh",
    "launch/test.sh",
)
COMMANDS = [
    f"{package}.{path.stem}"
    for package in ("data_prep", "pretrain")
    for path in sorted((REPOSITORY / package).glob("[a-z]*.py"))
    if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
]


def files_left_out_of(installed: Path) -> list[str]:
    """What the packages hold here, and an installation does not; what only readers need aside."""
    names = [
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and path.suffix not in (".md", ".png", ".pyc")
    ]
    assert len(names) > 100
    return [
        name
        for name in names
        if not name.startswith(FOR_A_CHECKOUT) and not (installed / name).exists()
    ]


def test_there_are_commands_to_look_at() -> None:
    assert len(COMMANDS) >= 9
    assert "pretrain.train" in COMMANDS


@pytest.mark.slow
def test_with_the_newest_of_everything_a_text_becomes_a_model_that_generates(
    tmp_path: Path,
) -> None:
    """All but torch, which is this environment's: from its default index come gigabytes for a
    GPU.
    """
    shutil.copytree(REPOSITORY, tmp_path / "project", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    with skip_without_registry():
        make_environment(tmp_path / "environment", [str(tmp_path / "project")], shared=("torch",))
    python = python_of(tmp_path / "environment")
    env = environment(
        PATH=f"{python.parent}:/usr/bin:/bin", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf")
    )
    del env["PYTHONPATH"]  # what runs is what was installed, not this checkout

    def run(*command: str) -> str:
        return type_in(str(python), *command)

    def type_in(*command: str) -> str:
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    installed = Path(run("-c", "import pretrain; print(pretrain.__file__)")).parents[1]
    assert installed.name == "site-packages"
    assert not files_left_out_of(installed)
    for command in COMMANDS:
        assert run("-m", command, "--help").startswith(f"usage: python -m {command} ")
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    mixture = write_mixture(
        tmp_path, tmp_path / "tokenizer", [source("texts", texts.name, format="jsonl")]
    )
    size = ["--algorithm", "byte_bpe", "--vocab-size", str(TINY_VOCAB_SIZE)]
    run(
        "-m",
        "data_prep.train_tokenizer",
        *size,
        "--source",
        str(texts),
        "--output-dir",
        "tokenizer",
    )
    run("-m", "data_prep.build_shards", "--mixture", str(mixture), "--output-dir", "dataset")
    recipe = write_recipe(tmp_path / "recipe.yaml")
    until = ["--stop-at-step", str(STEPS)]
    run(
        "-m",
        "pretrain.train",
        "--recipe",
        str(recipe),
        "--data-dir",
        "dataset",
        "--run-dir",
        "run",
        *until,
    )
    assert len(losses(tmp_path / "run")) == STEPS
    # on it goes by the script that the wheel has
    (script,) = re.findall(r"^(/\S+/site-packages/launch/pretrain\.sh) ", run("-m", "launch"), re.M)
    flags = ["--recipe", str(recipe), "--data-dir", "dataset", "--run-dir", "run"]
    type_in(script, *flags, "--ranks=2", "--stop-at-step", str(STEPS + 1))
    assert len(losses(tmp_path / "run")) == STEPS + 1
    run("-m", "pretrain.export_hf", "--run-dir", "run", "--output-dir", "export")
    assert run("-c", GENERATE, "export").split() == ["3"]
