"""`export_hf --check`: what is wrong with an export is said without its run, and so is how to
mend it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from support.runs import REPOSITORY, run_command
from support.untrained_runs import save_untrained_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.errors import UserError
from data_prep.files import digest_file
from pretrain.export_hf import main
from pretrain.hf.certificate import CERTIFICATE_NAME
from pretrain.hf.check import check_export
from pretrain.hf.check_model import WRONG_WITH_A_CACHE, names_in, version_of
from pretrain.hf.marker import MARKER_NAME
from pretrain.hf.names import MODELING_FILE
from pretrain.model.token_codes import DRAWN

OF_BEFORE = REPOSITORY / "tests" / "data" / "exports" / "modeling_tablefree.3656bb5.txt"
FORMS = ("tablefree", "gpt_neox", "gguf")

CUT = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def exports(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained run in all forms, and one of each drawn code."""
    home = tmp_path_factory.mktemp("exports")
    for form in FORMS:
        main(["--run-dir", str(text_run), "--output-dir", str(home / form), "--architecture", form])
    for name in DRAWN:
        run_dir = home / f"{name}_run"
        save_untrained_run(run_dir, text_run / "tokenizer", name)
        main(["--run-dir", str(run_dir), "--output-dir", str(home / name)])
    return {name: home / name for name in (*FORMS, *DRAWN)}


@pytest.fixture
def copy(exports: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an export, to be damaged."""

    def make(form: str) -> Path:
        return Path(shutil.copytree(exports[form], tmp_path / form))

    return make


def problems(directory: Path) -> str:
    """What is wrong, without the names of directories."""
    return (
        "\n".join(check_export(directory).problems)
        .replace(f"{directory}{os.sep}", "")
        .replace(str(directory), "DIR")
    )


def edit(directory: Path, name: str, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = json.loads((directory / name).read_bytes()) | changes
    (directory / name).write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )


def be_of_before(directory: Path) -> None:
    """An export as version 3656bb5 made it: modelling file, names of parameters, tokenizer, no
    version.
    """
    shutil.copyfile(OF_BEFORE, directory / MODELING_FILE.name)
    classes = {"AutoConfig": "TableFreeConfig", "AutoModelForCausalLM": "TableFreeForCausalLM"}
    auto_map = {auto: f"modeling_tablefree.{own}" for auto, own in classes.items()}
    edit(directory, "config.json", modeling_version=None, auto_map=auto_map)
    edit(directory, "tokenizer_config.json", split_special_tokens=True, model_input_names=None)
    weights = load_file(directory / "model.safetensors")
    names = {
        name: name.removeprefix("model.").replace("lm_head.", "output_projection.")
        for name in weights
    }
    save_file(
        {names[name]: weights[name] for name in weights},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    (directory / CERTIFICATE_NAME).unlink()
    marker = json.loads((directory / MARKER_NAME).read_bytes())
    del marker["files"][CERTIFICATE_NAME]
    marker["files"] = {name: digest_file(directory / name) for name in marker["files"]}
    (directory / MARKER_NAME).write_text(json.dumps(marker, indent=1, sort_keys=True) + "\n")


def without_marker_and_weights(directory: Path) -> None:
    (directory / MARKER_NAME).unlink()
    (directory / "model.safetensors").unlink()


def cut_marker(directory: Path) -> None:
    marker = directory / MARKER_NAME
    marker.write_bytes(marker.read_bytes()[:200])


@pytest.mark.parametrize("form", [*FORMS, *DRAWN])
def test_an_export_made_now_is_whole_and_right(
    form: str, exports: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--check", str(exports[form])])
    said = capsys.readouterr().out
    kind = {"gguf": "gguf in f32", "gpt_neox": "gpt_neox in float32"}.get(
        form, "tablefree in float32"
    )
    assert said.splitlines()[0].startswith(f"{exports[form]}: {kind}, after step ")
    certified = ["certificate: computes what its certificate tells"] if form != "gguf" else []
    lines = [line.partition(" to ")[0] for line in said.splitlines()[1:]]
    assert lines == [*certified, "whole, and right as far as is known"]


def test_an_export_of_before_is_told_and_mended_as_it_says(
    copy: Callable[[str], Path], exports: dict[str, Path]
) -> None:
    directory = copy("tablefree")
    be_of_before(directory)
    flags = ["-m", "pretrain.export_hf", "--check", str(directory)]
    result = run_command(sys.executable, *flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        f"error: {directory}: 3 problems; mend them as said above"
    )
    said = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
    assert len(said) == 3
    assert "generates wrong text with a KV cache under transformers 5.24 and newer" in said[0]
    mend = re.search(r"; (cp .+) mends it$", said[0])
    assert mend
    subprocess.run(mend[1], shell=True, check=True)
    edit(
        directory,
        "tokenizer_config.json",
        split_special_tokens=None,
        model_input_names=["input_ids", "attention_mask"],
    )
    result = run_command(sys.executable, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "modeling_tablefree.py was exchanged, and is as exports are made today" in result.stdout
    assert "tokenizer_config.json was exchanged, and is as exports are made today" in result.stdout
    ids = torch.arange(32)[None]
    mended, new = (
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        for path in (directory, exports["tablefree"])
    )
    with torch.no_grad():
        assert torch.equal(mended(ids).logits, new(ids).logits)


def test_every_modelling_file_that_early_exports_hold_is_known() -> None:
    assert digest_file(OF_BEFORE) in WRONG_WITH_A_CACHE
    assert digest_file(MODELING_FILE) not in WRONG_WITH_A_CACHE
    for digest, commit in WRONG_WITH_A_CACHE.items():
        shown = subprocess.run(
            ["git", "show", f"{commit}:pretrain/modeling_tablefree.py"],
            cwd=REPOSITORY, capture_output=True, check=False,
        )  # fmt: skip
        if shown.returncode != 0:
            pytest.skip("not a git checkout with its history")
        assert xxhash.xxh3_128_hexdigest(shown.stdout) == digest


def lack(name: str) -> Change:
    return lambda directory: (directory / name).unlink()


def flip(name: str) -> Change:
    """A change of one bit in the middle of a file."""

    def change(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content)

    return change


def put(name: str, **changes: Any) -> Change:
    return lambda directory: edit(directory, name, **changes)


def write(name: str, text: str) -> Change:
    return lambda directory: (directory / name).write_text(text) and None


def be_of_before_markers(directory: Path) -> None:
    (directory / MARKER_NAME).unlink()
    code = directory / MODELING_FILE.name
    code.write_text(code.read_text() + "# mine\n")


def put_an_old_file_beside_a_new_config(directory: Path) -> None:
    shutil.copyfile(OF_BEFORE, directory / MODELING_FILE.name)


@pytest.mark.parametrize(
    ("form", "change", "says"),
    [
        # files
        (
            "tablefree",
            lack("model.safetensors"),
            "model.safetensors: missing; export the run again",
        ),
        ("gguf", lack("model-F32.gguf"), "model-F32.gguf: missing; export the run again"),
        (
            "gguf",
            flip("model-F32.gguf"),
            "model-F32.gguf: differs from its digest, so it is damaged or was edited",
        ),
        ("gpt_neox", flip("model.safetensors"), "model.safetensors: differs from its digest"),
        ("gpt_neox", lack("README.md"), "README.md: missing"),
        ("tablefree", lack("config.json"), "config.json: missing"),
        ("tablefree", write("config.json", "["), "config.json: not valid JSON"),
        ("tablefree", write("config.json", "[" * 100_000), "config.json: not valid JSON"),
        ("tablefree", write("config.json", "[]"), "config.json: a JSON list, expected an object"),
        (
            "tablefree",
            put("config.json", model_type="llama"),
            "config.json: model_type 'llama' is of no export",
        ),
        (
            "tablefree",
            write("model.safetensors", "no"),
            "model.safetensors: not readable as safetensors",
        ),
        # modelling file
        ("tablefree", lack("modeling_tablefree.py"), "modeling_tablefree.py: missing"),
        (
            "tablefree",
            write("modeling_tablefree.py", "def ("),
            "modeling_tablefree.py: no readable program",
        ),
        (
            "tablefree",
            be_of_before_markers,
            "modeling_tablefree.py: of no version of ours, so it was edited; cp ",
        ),
        (
            "tablefree",
            put_an_old_file_beside_a_new_config,
            "version 1, older than config.json, which is of version ",
        ),
        (
            "tablefree",
            put("config.json", modeling_version=99),
            "older than config.json, which is of version 99",
        ),
        # configuration
        (
            "tablefree",
            put("config.json", parallel_residual=True),
            "parallel_residual: nothing reads it: unknown key",
        ),
        (
            "tablefree",
            put("config.json", seq_length=64),
            "seq_length: nothing reads it: unknown key; did you",
        ),
        (
            "gpt_neox",
            put("config.json", use_paralel_residual=False),
            "did you mean use_parallel_residual?",
        ),
        (
            "tablefree",
            put("config.json", code_bits=8),
            "code_bits 8 tell fewer than vocab_size 512 ids apart",
        ),
        (
            "tablefree",
            put("config.json", code_bits=11),
            "code_bits 11 does not fill d_model 48 evenly",
        ),
        (
            "tablefree",
            put("config.json", num_heads=5),
            "d_model 48 is no even number of channels for each of 5 heads",
        ),
        ("tablefree", put("config.json", code_bits="16"), "config.json: code_bits '16' is no"),
        (
            "affine_code",
            put("config.json", affine_rows=[1] * 16),
            "are no invertible code of 16 bits",
        ),
        ("affine_code", put("config.json", affine_rows=None), "are no invertible code of 16 bits"),
        ("permuted_code", put("config.json", permutation_keys=[1, 2]), "are no 8 numbers"),
        (
            "permuted_code",
            put("config.json", permutation_offset=None),
            "permutation_keys and permutation_offset are no 8 numbers",
        ),
        (
            "permuted_code",
            put_an_old_file_beside_a_new_config,
            "version 1, older than config.json, which is of version ",
        ),
        (
            "tablefree",
            put("config.json", vocab_size=511),
            "has shape (512, 48), config.json tells (511, 48)",
        ),
        ("gpt_neox", put("config.json", num_hidden_layers=3), "2 layers, config.json tells 3"),
        # tokenizer
        ("tablefree", lack("tokenizer.json"), "tokenizer.json: missing"),
        (
            "gpt_neox",
            put("tokenizer_config.json", tokenizer_class="GPT2Tokenizer"),
            "write PreTrainedTokenizerFast",
        ),
        (
            "gpt_neox",
            put("tokenizer_config.json", split_special_tokens=True),
            "keeps the end of a text from",
        ),
        (
            "gpt_neox",
            put("tokenizer_config.json", model_input_names=None),
            "refuses model.generate(**tokenizer(text))",
        ),
        (
            "gpt_neox",
            put("tokenizer_config.json", pad_token="<none>"),
            "pad_token '<none>' is no token",
        ),
        (
            "gpt_neox",
            put("tokenizer_config.json", model_max_length=[]),
            "can't load or use the exported tokenizer",
        ),
        (
            "gpt_neox",
            put("tokenizer.json", truncation=CUT),
            "tokenizer.json: adds tokens to texts, cuts",
        ),
        (
            "gpt_neox",
            put("config.json", pad_token_id=0),
            "config.json: pad_token_id 0, the tokenizer's is 511",
        ),
        (
            "tablefree",
            put("config.json", eos_token_id=7),
            "config.json: eos_token_id 7, the tokenizer's is 0",
        ),
        (
            "gpt_neox",
            put("config.json", use_parallel_residual=True),
            "use_parallel_residual is True, and False in",
        ),
        (
            "gpt_neox",
            put("config.json", hidden_act="relu"),
            "hidden_act is relu, and gelu in every export",
        ),
        ("tablefree", without_marker_and_weights, "model.safetensors: missing"),
        (
            "gpt_neox",
            cut_marker,
            "tablefree_export.json: damaged, so that nothing here is known to be whole",
        ),
    ],
)
def test_what_is_wrong_with_an_export_is_said(
    form: str,
    change: Change,
    says: str,
    copy: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = copy(form)
    change(directory)
    assert says in problems(directory)
    with pytest.raises(UserError) as raised:
        main(["--check", str(directory)])
    assert "\n" not in str(raised.value)
    assert "whole, and right" not in capsys.readouterr().out


def test_what_others_put_beside_an_export_is_no_fault_of_it(copy: Callable[[str], Path]) -> None:
    directory = copy("tablefree")
    (directory / "notes.md").write_text("mine")
    with (directory / "README.md").open("a") as card:
        card.write("My own words.\n")
    verdict = check_export(directory)
    assert not verdict.problems
    edited = "README.md was edited; nothing loads it"
    assert verdict.notes == (edited, "not of the export, and not looked at: notes.md")


@pytest.mark.parametrize("form", ["tablefree", "gpt_neox"])
def test_an_export_that_was_loaded_and_saved_again_is_right(
    form: str, copy: Callable[[str], Path]
) -> None:
    """As after fine-tuning; transformers 5 writes a template that adds nothing, and another name
    of the plain class.
    """
    directory = copy(form)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    (directory / MARKER_NAME).unlink()
    tokenizer.save_pretrained(directory)
    assert not check_export(directory).problems


def test_nothing_of_an_export_is_run(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("tablefree")
    code = directory / MODELING_FILE.name
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{code.read_text()}")
    assert "modeling_tablefree.py: differs from its digest" in problems(directory)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_export_is_said(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no export: neither config"):
            main(["--check", str(directory)])
    with pytest.raises(UserError, match="--step does not go with --check"):
        main(["--check", str(tmp_path), "--step", "3"])
    for flags in ([], ["--run-dir", "a"]):
        with pytest.raises(UserError, match=r"--(run|output)-dir is missing"):
            main(flags)


def test_versions_and_names_are_read_off_a_modelling_file() -> None:
    assert version_of(OF_BEFORE) == 1
    assert version_of(MODELING_FILE) >= 2
    assert {"d_model", "affine_rows", "use_cache"} <= names_in(OF_BEFORE)
    assert "modeling_version" not in names_in(OF_BEFORE)


def test_a_tokenizer_of_before_still_gives_the_ids_once_mended(copy: Callable[[str], Path]) -> None:
    directory = copy("gpt_neox")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    end = tokenizer.eos_token
    edit(directory, "tokenizer_config.json", split_special_tokens=True)
    assert len(AutoTokenizer.from_pretrained(directory)(end)["input_ids"]) > 1
    edit(directory, "tokenizer_config.json", split_special_tokens=None)
    assert AutoTokenizer.from_pretrained(directory)(end)["input_ids"] == [tokenizer.eos_token_id]
    assert not check_export(directory).problems
