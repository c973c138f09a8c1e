"""Exports: both forms give the training class's logits, load without this project, and generate."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import environment, run_command
from support.untrained_runs import save_untrained_run
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.errors import UserError
from data_prep.files import digest_file
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.reader import load_model
from pretrain.export_hf import main
from pretrain.hf.engines import engines_of
from pretrain.hf.marker import MARKER_NAME
from pretrain.modeling_tablefree import (
    INPUT_EMBEDDINGS,
    TokenCode,
    name_in_model,
)

FORMS = ("tablefree", "gpt_neox")

# The project out of reach, as for somebody who has only the export.
WITHOUT_PROJECT = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pretrain", "data_prep", "deepspeed"):
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def runs(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each input."""
    home = tmp_path_factory.mktemp("runs")
    for name in INPUT_EMBEDDINGS:
        save_untrained_run(home / name, text_run / "tokenizer", name)
    return {name: home / name for name in INPUT_EMBEDDINGS}


@pytest.fixture(scope="module")
def exports(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained run in both forms."""
    home = tmp_path_factory.mktemp("exports")
    for form in FORMS:
        main(["--run-dir", str(text_run), "--output-dir", str(home / form), "--architecture", form])
    return {form: home / form for form in FORMS}


def some_ids() -> Tensor:
    return torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_the_training_class_with_the_same_masters(
    form: str, input_embedding: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = runs[input_embedding]
    main(
        [
            "--run-dir",
            str(run_dir),
            "--output-dir",
            str(tmp_path / "export"),
            "--architecture",
            form,
        ]
    )
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", trust_remote_code=True
    ).eval()
    trained = load_model(load_for_reading(run_dir)).eval()
    with torch.no_grad():
        expected, got = trained(some_ids()).logits, exported(some_ids()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_generates_the_same_with_and_without_a_cache(form: str, exports: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exports[form], trust_remote_code=True).eval()
    ids = some_ids()[:, :5]
    cached, plain = (
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            use_cache=cache,
        )
        for cache in (True, False)
    )
    assert cached.shape[1] > 5
    assert torch.equal(cached, plain)


def test_both_forms_generate_the_same(exports: dict[str, Path]) -> None:
    ids = some_ids()[:1, :5]
    outputs = [
        AutoModelForCausalLM.from_pretrained(exports[form], trust_remote_code=True).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        for form in FORMS
    ]
    assert torch.equal(*outputs)


def test_the_stock_form_needs_no_remote_code(exports: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exports["gpt_neox"], trust_remote_code=False)
    assert type(model).__module__ == "transformers.models.gpt_neox.modeling_gpt_neox"
    assert not list(exports["gpt_neox"].glob("*.py"))


def test_the_tablefree_form_holds_no_input_table(exports: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exports["tablefree"], trust_remote_code=True)
    assert type(model.get_input_embeddings()).__name__ == TokenCode.__name__
    assert not list(model.get_input_embeddings().parameters())
    assert not [name for name in model.state_dict() if "embed" in name]


@pytest.mark.parametrize("form", FORMS)
def test_the_cards_loading_example_runs_word_for_word(
    form: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    card = (exports[form] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert example
    for line in (
        "AutoTokenizer.from_pretrained(repo_id, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)",
        "tokenizer.encode(prompt)",
        "model.generate(input_ids, max_new_tokens=3, do_sample=False)",
        "tokenizer.decode(output_ids[0].tolist())",
    ):
        assert line in example[1]
    code = WITHOUT_PROJECT + example[1].replace("REPOSITORY", str(exports[form]))
    env = environment(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
    del env["PYTHONPATH"]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Question: What is the capital of France?\nAnswer:")


def test_the_tokenizer_comes_along(exports: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exports["gpt_neox"])
    text = "Fellow citizens — 1,024 souls <|endoftext|>\n\tend"
    ids = tokenizer.encode(text, split_special_tokens=True)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("form", FORMS)
def test_made_twice_the_files_are_equal_bit_for_bit(
    form: str, exports: dict[str, Path], text_run: Path, tmp_path: Path
) -> None:
    flags = [
        "--run-dir",
        str(text_run),
        "--output-dir",
        str(tmp_path / "again"),
        "--architecture",
        form,
    ]
    if form == "tablefree":  # in another process
        result = run_command(sys.executable, "-m", "pretrain.export_hf", *flags)
        assert result.returncode == 0, result.stderr
    else:
        main(flags)
    names = sorted(file.name for file in exports[form].iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    _, mismatch, errors = filecmp.cmpfiles(exports[form], tmp_path / "again", names, shallow=False)
    assert not mismatch
    assert not errors


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_weights_load_as_bfloat16(form: str, text_run: Path, tmp_path: Path) -> None:
    flags = [
        "--run-dir",
        str(text_run),
        "--output-dir",
        str(tmp_path / "e"),
        "--architecture",
        form,
    ]
    main([*flags, "--dtype", "bfloat16"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "e", trust_remote_code=True)
    reference = load_model(load_for_reading(text_run))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        difference = (model(some_ids()).logits.float() - reference(some_ids()).logits).abs().max()
    assert difference < 0.1


def test_an_export_over_an_older_one_replaces_it(text_run: Path, tmp_path: Path) -> None:
    flags = ["--run-dir", str(text_run), "--output-dir", str(tmp_path / "e")]
    main([*flags, "--architecture", "tablefree"])
    main([*flags, "--architecture", "gpt_neox"])
    assert json.loads((tmp_path / "e" / "config.json").read_text())["model_type"] == "gpt_neox"
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_directory_of_something_else_is_left_alone(text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="holds something else than an export"):
        main(["--run-dir", str(text_run), "--output-dir", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_the_card_tells_what_the_model_is(exports: dict[str, Path]) -> None:
    card = (exports["tablefree"] / "README.md").read_text(encoding="utf-8")
    for part in (
        "library_name: transformers",
        "arxiv:2605.09751",
        "licences",
        "Intended use and limits",
        "@article",
    ):
        assert part in card
    assert str(exports["tablefree"]) not in card
    assert "\n`<|endoftext|>` in a text ends it. In the training data such tokens" in card


@pytest.mark.parametrize("form", FORMS)
def test_the_card_tells_in_which_engines_its_form_was_run(
    form: str, exports: dict[str, Path]
) -> None:
    card = (exports[form] / "README.md").read_text(encoding="utf-8")
    section = card.partition("## Engines\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    assert rows[2:] == [
        [
            r.engine,
            r.version,
            r.tried,
            "as trained" if (error := r.errors["binary_code"]) is None else f"not in full: {error}",
        ]
        for r in engines_of(form, "binary_code")
    ]
    assert {row[0] for row in rows[2:]} >= {"transformers", "peft", "trl", "lm-eval"}


def test_the_tokenizer_knows_how_long_a_text_the_model_takes(exports: dict[str, Path]) -> None:
    assert AutoTokenizer.from_pretrained(exports["tablefree"]).model_max_length == 32


def test_a_run_without_its_tokenizer_exports_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(runs["learned"], run_dir)
    (run_dir / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        main(["--run-dir", str(run_dir), "--output-dir", str(tmp_path / "e")])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_than_the_checkpoint_s_is_not_exported(
    name: str, text_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(text_run, run_dir)
    path = run_dir / "tokenizer" / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(
        UserError, match=r"is not the tokenizer of the checkpoint \(sha256 [0-9a-f]{12}, not"
    ):
        main(["--run-dir", str(run_dir), "--output-dir", str(tmp_path / "e")])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_the_class_does_not_give_is_refused(exports: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exports["tablefree"], trust_remote_code=True)
    for name in ("output_attentions", "past_hidden_states", "is_causal", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=name):
            model(some_ids(), **{name: True})


# What an export may replace


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, links as such."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_symlink() or path.is_file()]
    return {
        str(path): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in paths
    }


def export(run_dir: Path, output: Path, *more: str) -> None:
    main(["--run-dir", str(run_dir), "--output-dir", str(output), *more])


def test_an_export_carries_the_digest_of_each_of_its_files(exports: dict[str, Path]) -> None:
    for form, directory in exports.items():
        marker = json.loads((directory / MARKER_NAME).read_text())
        assert (marker["architecture"], marker["dtype"], marker["step"]) == (form, "float32", 20)
        names = {path.name for path in directory.iterdir()} - {MARKER_NAME}
        assert marker["files"] == {name: digest_file(directory / name) for name in names}
        # paths of this machine
        assert not [key for key in marker["recipe"] if key.startswith("data.")]


def add_file(output: Path) -> None:
    (output / "notes.md").write_text("mine")


def add_directory(output: Path) -> None:
    (output / "scripts").mkdir()
    (output / "scripts" / "serve.py").write_text("mine")


def add_nothing_but_a_directory(output: Path) -> None:
    (output / "empty").mkdir()


def put_a_link_in_place(output: Path) -> None:
    (output.parent / "mine.md").write_text("mine")
    (output / "README.md").unlink()
    (output / "README.md").symlink_to(output.parent / "mine.md")


def be_of_before_there_was_a_marker(output: Path) -> None:
    (output / MARKER_NAME).unlink()


def damage_the_marker(output: Path) -> None:
    (output / MARKER_NAME).write_text("[" * 100_000)


def edit(output: Path) -> None:
    card = output / "README.md"
    card.write_text(card.read_text() + "My own words.\n")


def lack_a_file(output: Path) -> None:
    (output / "README.md").unlink()


@pytest.mark.parametrize(
    ("change", "says", "overwritten"),
    [
        (add_file, "notes.md is no part of the export there; move it away", False),
        (add_directory, "scripts is no part of the export there", False),
        (add_nothing_but_a_directory, "empty is no part of the export there", False),
        (put_a_link_in_place, "README.md is no part of the export there", False),
        (
            be_of_before_there_was_a_marker,
            f"holds something else than an export with its {MARKER_NAME}",
            False,
        ),
        (damage_the_marker, f"holds something else than an export with its {MARKER_NAME}", False),
        (edit, "README.md was changed since it was exported; --overwrite replaces it", True),
        (lack_a_file, "README.md of the export there is missing; --overwrite replaces it", True),
    ],
)
def test_what_an_export_would_lose_is_refused_and_stays(
    change: Callable[[Path], None],
    says: str,
    overwritten: bool,
    exports: dict[str, Path],
    text_run: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "home" / "e"
    shutil.copytree(exports["gpt_neox"], output)
    change(output)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=re.escape(says)):
        export(text_run, output)
    assert contents(tmp_path) == before
    if overwritten:
        export(text_run, output, "--overwrite")
        assert contents(output).keys() == {
            str(output / path.name) for path in exports["tablefree"].iterdir()
        }
    else:
        with pytest.raises(UserError, match=re.escape(says)):
            export(text_run, output, "--overwrite")
        assert contents(tmp_path) == before


def test_an_export_goes_neither_into_a_data_set_nor_among_checkpoints(
    runs: dict[str, Path], text_data: Path
) -> None:
    for place, says in (
        (runs["binary_code"] / "checkpoints" / "export", "is among the run's checkpoints"),
        (text_data / "deep" / "export", f"is in the data set {text_data}"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            export(runs["binary_code"], place)
        assert not place.exists()


def test_another_run_s_export_takes_overwrite(runs: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "e"
    export(runs["learned"], output)
    before = contents(output)
    says = (
        "holds an export of another run (model.input_embedding learned, here binary_code); "
        "--overwrite replaces it"
    )
    with pytest.raises(UserError, match=re.escape(says)):
        export(runs["binary_code"], output)
    assert contents(output) == before
    export(runs["binary_code"], output, "--overwrite")
    assert (
        json.loads((output / MARKER_NAME).read_text())["recipe"]["model.input_embedding"]
        == "binary_code"
    )


def test_a_file_or_a_dangling_link_is_no_place_for_an_export(
    text_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is no directory; give another"):
            export(text_run, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_into_a_link_to_a_larger_disk_lies_there(text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "large" / "e").mkdir(parents=True)
    (tmp_path / "e").symlink_to(tmp_path / "large" / "e")
    for _ in range(2):
        export(text_run, tmp_path / "e")
    assert (tmp_path / "e").is_symlink()
    assert (tmp_path / "large" / "e" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["e"]


def test_the_checkpoint_of_a_step_is_exported_over_that_of_another(
    text_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "e"
    export(text_run, output)
    export(text_run, output, "--step", "15")
    assert json.loads((output / MARKER_NAME).read_text())["step"] == 15
    weights = load_file(output / "model.safetensors")
    checkpoint = load_for_reading(text_run, 15)
    assert weights.keys() == {name_in_model(name) for name in checkpoint.shapes}
    assert all(
        torch.equal(weights[name_in_model(name)], checkpoint.parameter(name))
        for name in checkpoint.shapes
    )
    export(text_run / "checkpoints" / "step-00000015", tmp_path / "same")
    for name in contents(output):
        assert Path(name).read_bytes() == (tmp_path / "same" / Path(name).name).read_bytes()


def test_a_checkpoint_by_itself_has_no_tokenizer_to_export(text_run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "step-00000015"
    shutil.copytree(text_run / "checkpoints" / alone.name, alone)
    with pytest.raises(UserError, match="a checkpoint outside of its run has no tokenizer"):
        export(alone, tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_have_the_mode_that_the_umask_gives(
    umask: int, text_run: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        export(text_run, tmp_path / "e")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "e").iterdir()}
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            {"code_bits": 9, "d_model": 36, "num_heads": 2},
            "ids 0 (`'<|endoftext|>'`) and 511 (`'<pad>'`) are one input",
        ),
        ({"code_bits": 16}, None),
    ],
)
def test_the_card_says_which_two_ids_are_one_input(
    model: dict[str, int], says: str | None, text_run: Path, tmp_path: Path
) -> None:
    save_untrained_run(tmp_path / "run", text_run / "tokenizer", "binary_code", **model)
    main(["--run-dir", str(tmp_path / "run"), "--output-dir", str(tmp_path / "export")])
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "projection.\n\n" in card
    assert (says in card) if says else ("one input" not in card)
