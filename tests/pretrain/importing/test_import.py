"""Runs that begin with the weights of others: exports, stock GPT-NeoX, published models."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.forked_ranks import run_ranks, train_on
from support.runs import losses, run_command, write_recipe
from support.untrained_runs import save_untrained_run
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from data_prep.errors import UserError
from pretrain import evaluate, export_hf
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.reader import load_model
from pretrain.import_hf import main
from pretrain.importing.codes import find_code, solve_affine
from pretrain.modeling_tablefree import INPUT_EMBEDDINGS, TableFreeConfig, TokenCode
from pretrain.run.first_checks import engine_flags_by_default
from pretrain.run.state import write_state

FORMS = ("tablefree", "gpt_neox")


@pytest.fixture(scope="module")
def exports(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export of each form and input, of weights none of which is as it was initialised."""
    home = tmp_path_factory.mktemp("exports")
    found = {}
    for name in INPUT_EMBEDDINGS:
        save_untrained_run(home / name, text_run / "tokenizer", name, code_seed=5)
        for form in FORMS:
            found[f"{form}-{name}"] = home / f"{form}-{name}"
            export(home / name, found[f"{form}-{name}"], form)
    return found


def export(run_dir: Path, output: Path, form: str, *more: str) -> None:
    flags = ["--run-dir", str(run_dir), "--output-dir", str(output), "--architecture", form]
    export_hf.main([*flags, *more])


def import_from(directory: Path, run_dir: Path, *more: str) -> Path:
    main(["--from", str(directory), "--run-dir", str(run_dir), *more])
    return run_dir


def refused(directory: Path, run_dir: Path, *more: str) -> str:
    """The one line of a refusal; nothing is written."""
    with pytest.raises(UserError) as caught:
        import_from(directory, run_dir, *more)
    assert not run_dir.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Round trips


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
@pytest.mark.parametrize("form", FORMS)
def test_an_export_imported_and_exported_has_the_same_weights_bit_for_bit(
    form: str, input_embedding: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    origin = exports[f"{form}-{input_embedding}"]
    run_dir = import_from(origin, tmp_path / "run")
    config = load_for_reading(run_dir).manifest.model_config
    own = json.loads((exports[f"tablefree-{input_embedding}"] / "config.json").read_text())
    assert config["input_embedding"] == input_embedding
    means_nothing = {"code_bits"} if input_embedding == "learned" else set()
    for key in config.keys() & own.keys() - means_nothing:
        assert config[key] == own[key], key
    for again in FORMS:
        export(run_dir, tmp_path / again, again)
        before = load_file(exports[f"{again}-{input_embedding}"] / "model.safetensors")
        after = load_file(tmp_path / again / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_goes_on_from_imported_weights_on_a_data_set_of_their_tokenizer(
    text_run: Path, text_data: Path, tmp_path: Path
) -> None:
    """The first loss is that of the weights, where a fresh run begins at ln(V); then it goes on as
    any run: it stops, continues, and is exported.
    """
    export(text_run, tmp_path / "export", "gpt_neox")
    run_dir = import_from(tmp_path / "export", tmp_path / "run")
    evaluate.main(["--run-dir", str(run_dir), "--data-dir", str(text_data)])
    evaluate.main(["--run-dir", str(text_run), "--data-dir", str(text_data)])
    figures = [
        next(run.glob("eval*/*.json"), run / "evaluation.json") for run in (run_dir, text_run)
    ]
    imported, trained = (json.loads(path.read_text()) for path in figures)
    assert imported["loss"] == trained["loss"]
    with pytest.raises(UserError, match="say on which to measure it with --data-dir"):
        evaluate.main(["--run-dir", str(run_dir)])
    export(run_dir, tmp_path / "before", "tablefree")
    assert "No step was trained since." in (tmp_path / "before" / "README.md").read_text()
    recipe = str(write_recipe(tmp_path / "r.yaml"))
    train_on(1, Path(recipe), text_data, run_dir, "--stop-at-step", "2")
    train_on(1, Path(recipe), text_data, run_dir, "--stop-at-step", "4")
    assert len(losses(run_dir)) == 4
    assert losses(run_dir)[0] < losses(text_run)[0] - 0.1
    state = json.loads((run_dir / "state.json").read_bytes())
    assert state["imported_from"] == f"{(tmp_path / 'export').resolve()} (gpt_neox)"
    export(run_dir, tmp_path / "after", "tablefree")
    card = (tmp_path / "after" / "README.md").read_text()
    assert "It began with the weights of `export (gpt_neox)`." in card
    assert "tokens in 4 steps" in card


def test_a_branch_from_imported_weights_trains_as_their_own_run_does(
    exports: dict[str, Path], text_data: Path, tmp_path: Path
) -> None:
    """So several runs, on several data sets, begin with one import, which stays as it is."""
    imported = import_from(exports["gpt_neox-affine_code"], tmp_path / "imported")
    before = {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()}
    flags = ["--branch-from", str(imported / "checkpoints" / "step-00000000")]
    embedding = "--model.input_embedding=affine_code"
    recipe = write_recipe(tmp_path / "r.yaml", train_tokens=6 * 6 * 32)
    branch = tmp_path / "branch"
    # another tokenizer's ids mean nothing to them
    file = imported / "tokenizer" / "tokenizer.json"
    whole = file.read_bytes()
    definition = json.loads(whole)
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    file.write_text(json.dumps(definition))
    ended = run_ranks(1, recipe, text_data, branch, embedding, *flags)
    assert ended.exit_codes == [2]
    assert f"its tokenizer is not that of {exports['gpt_neox-affine_code']}" in ended.output
    assert not branch.exists()
    file.write_bytes(whole)
    train_on(1, recipe, text_data, branch, embedding, *flags, "--stop-at-step", "3")
    train_on(1, recipe, text_data, branch, embedding, *flags)
    assert {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()} == before
    train_on(1, recipe, text_data, imported, embedding)
    assert len(losses(branch)) == 6
    assert losses(branch) == losses(imported)
    state = json.loads((branch / "state.json").read_bytes())
    assert state["imported_from"] == f"{exports['gpt_neox-affine_code'].resolve()} (gpt_neox)"
    assert "stages" not in state
    # a branch of that one still began with those weights
    flags = ["--branch-from", str(branch / "checkpoints" / "step-00000005"), embedding]
    train_on(1, recipe, text_data, tmp_path / "again", *flags, "--stop-at-step", "6")
    again = json.loads((tmp_path / "again" / "state.json").read_bytes())
    assert again["imported_from"] == state["imported_from"]


def test_another_tokenizer_or_architecture_is_refused_when_training_starts(
    exports: dict[str, Path], text_data: Path, tmp_path: Path
) -> None:
    run_dir = import_from(exports["tablefree-binary_code"], tmp_path / "run")
    recipe = str(write_recipe(tmp_path / "r.yaml"))
    flags = ["-m", "pretrain.train", "--data-dir", str(text_data), "--run-dir", str(run_dir)]
    result = run_command(sys.executable, *flags, "--recipe", recipe, "--model.num_layers=3")
    assert result.returncode == 2
    assert "the imported weights have model.num_layers=2, got 3" in result.stderr
    file = run_dir / "tokenizer" / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    file.write_text(json.dumps(definition))
    result = run_command(sys.executable, *flags, "--recipe", recipe)
    assert result.returncode == 2
    assert "its tokenizer is not that of" in result.stderr
    assert not (run_dir / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        evaluate.main(["--run-dir", str(run_dir), "--data-dir", str(text_data)])


@pytest.mark.parametrize("trained", [False, True])
def test_the_launcher_takes_imported_weights_for_a_run_that_has_not_begun(
    trained: bool, exports: dict[str, Path], tmp_path: Path
) -> None:
    """On a CPU it chooses fp32 for a new run, and leaves one that goes on alone."""
    run_dir = import_from(exports["tablefree-binary_code"], tmp_path / "run")
    if trained:
        write_state(run_dir, fingerprint="0" * 32)
    recipe = write_recipe(tmp_path / "r.yaml", engine="zero2_bf16")
    flags = ["--recipe", str(recipe), "--data-dir", "d", "--run-dir", str(run_dir)]
    chosen = engine_flags_by_default(flags, gpus=0)
    assert chosen == ([] if trained else ["--deepspeed-config", "zero2_fp32"])


# Codes found again


@pytest.mark.parametrize("lift", ["repeat", "repeat_interleave"])
@pytest.mark.parametrize("vocab_size", [300, 512])
def test_an_affine_code_is_solved_from_its_table_alone(vocab_size: int, lift: str) -> None:
    config = TableFreeConfig(
        vocab_size=vocab_size, d_model=36, num_heads=2, code_bits=9, input_embedding="affine_code",
        affine_rows=[273, 2, 68, 9, 16, 33, 64, 128, 256], affine_offset=77,
    )  # fmt: skip
    codes = TokenCode(config).code(torch.arange(vocab_size)).float()
    table = codes.repeat(1, 4) if lift == "repeat" else codes.repeat_interleave(4, dim=1)
    found = find_code(table, [])
    assert found is not None
    assert (found.input_embedding, found.code_bits, found.lift) == ("affine_code", 9, lift)
    again = TableFreeConfig(
        vocab_size=vocab_size, d_model=36, num_heads=2, code_bits=9, input_embedding="affine_code",
        **found.drawn,
    )  # fmt: skip
    assert torch.equal(TokenCode(again).code(torch.arange(vocab_size)).float(), codes)
    numbers = (codes.long() << torch.arange(9)).sum(dim=1)
    numbers[7] ^= 1
    assert solve_affine(numbers, 9) is None


def test_a_code_of_unknown_key_is_refused_and_a_recipe_tells_it(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    origin = shutil.copytree(exports["gpt_neox-permuted_code"], tmp_path / "export")
    (origin / "tablefree_export.json").unlink()
    assert "nothing tells the seed of a permuted one" in refused(origin, tmp_path / "run")
    model = {"input_embedding": "permuted_code", "code_seed": 5}
    recipe = write_recipe(tmp_path / "r.yaml", model=model)
    import_from(origin, tmp_path / "run", "--recipe", str(recipe))
    table = write_recipe(tmp_path / "t.yaml", model={"input_embedding": "learned"})
    run_dir = import_from(origin, tmp_path / "as-table", "--recipe", str(table))
    assert load_for_reading(run_dir).manifest.model_config["input_embedding"] == "learned"
    other = write_recipe(tmp_path / "o.yaml", model={**model, "num_layers": 3})
    said = refused(origin, tmp_path / "other", "--recipe", str(other))
    assert "model.num_layers is 3, and 2 in" in said


# Stock GPT-NeoX


def stock(directory: Path, tokenizer: Path, **changes: Any) -> GPTNeoXForCausalLM:
    """A small GPT-NeoX as transformers saves it, every parameter random."""
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 192, "max_position_embeddings": 32, "use_parallel_residual": False,
        "rotary_pct": 1.0, "tie_word_embeddings": False, "eos_token_id": 0,
    }  # fmt: skip
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, **changes})).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    model.save_pretrained(directory)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, directory / file.name)
    return model


def some_ids() -> Tensor:
    return torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", [{}, {"attention_bias": False}])
def test_a_stock_gpt_neox_gives_its_logits(
    changes: dict[str, Any], text_data: Path, tmp_path: Path
) -> None:
    theirs = stock(tmp_path / "stock", text_data / "tokenizer", **changes)
    ours = load_model(load_for_reading(import_from(tmp_path / "stock", tmp_path / "run"))).eval()
    assert ours.config.input_embedding == "learned"
    with torch.no_grad():
        expected = theirs(some_ids()).logits
        torch.testing.assert_close(ours(some_ids()).logits, expected, rtol=1e-5, atol=1e-4)
    assert (expected - expected[:1, :1]).std() > 0.3  # tokens matter


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_parallel_residual": True}, "use_parallel_residual is True, and this decoder"),
        ({"use_parallel_residual": None}, "use_parallel_residual is None"),
        ({"rotary_pct": 0.25, "partial_rotary_factor": 0.25}, "rotary_pct is 0.25, and this"),
        ({"rotary_emb_base": 50_000}, "rotary_emb_base is 50000, and this decoder computes"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"intermediate_size": 96}, "intermediate_size is 96, and this decoder computes 192"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ({"model_type": "llama"}, "model_type 'llama'; what can be imported is"),
        ({"num_hidden_layers": 3}, "no tensor is layers.2.attention_norm.weight, of shape"),
        ({"num_hidden_layers": 1}, "gpt_neox.layers.1."),
        (
            {"vocab_size": 511},
            "or a part of it, whose shape is [511, 48]",
        ),
        ({"hidden_size": 0}, "hidden_size 0 is no positive whole number"),
        ({"num_attention_heads": 5}, "is no even number of channels for each of 5 heads"),
    ],
)
def test_what_this_decoder_does_not_compute_is_refused_by_its_key(
    changes: dict[str, Any], says: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    origin = Path(shutil.copytree(exports["gpt_neox-learned"], tmp_path / "export"))
    config = json.loads((origin / "config.json").read_text()) | changes
    (origin / "config.json").write_text(json.dumps(config))
    assert says in refused(origin, tmp_path / "run")


def lack(name: str) -> Any:
    return lambda directory: (directory / name).unlink()


def spoil_weights(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up.weight"][3, 4] = float("nan")
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lack("config.json"), "no config.json there"),
        (lack("model.safetensors"), "no model.safetensors"),
        (lack("tokenizer.json"), "tokenizer.json: missing; copy the tokenizer of the weights"),
        (spoil_weights, "model.layers.0.mlp.up.weight holds what is no number"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 99), "not readable"),
    ],
)
def test_a_damaged_directory_is_refused_and_nothing_written(
    damage: Any, says: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    origin = Path(shutil.copytree(exports["tablefree-binary_code"], tmp_path / "export"))
    damage(origin)
    assert says in refused(origin, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


def test_a_run_is_never_begun_over_something(exports: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    flags = ["--from", str(exports["tablefree-binary_code"]), "--run-dir", str(tmp_path / "run")]
    result = run_command(sys.executable, "-m", "pretrain.import_hf", *flags)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("is there already; give a new directory")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    flags = ["--from", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "new")]
    result = run_command(sys.executable, "-m", "pretrain.import_hf", *flags)
    assert (result.returncode, (tmp_path / "new").exists()) == (2, False)
    assert "Traceback" not in result.stderr
