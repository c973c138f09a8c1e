import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.runs import tiny_recipe_content, write_recipe

from data_prep.errors import UserError
from pretrain.config.changes import MAY_CHANGE_ON_RESUME, flatten, refuse_changes
from pretrain.config.load import (
    apply_overrides,
    build_recipe,
    dotted_keys,
    load_recipe,
    recipe_to_dict,
    recipe_to_yaml,
)
from pretrain.config.recipe import Recipe
from pretrain.config.recipe_names import ELSEWHERE, OURS
from pretrain.model.build import model_config


def tiny(**sections: Any) -> Recipe:
    return build_recipe(tiny_recipe_content(**sections), "tiny.yaml")


def refusal(**sections: Any) -> str:
    """The one line that a recipe gets."""
    with pytest.raises(UserError) as caught:
        tiny(**sections)
    assert str(caught.value).startswith("tiny.yaml: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Values


def test_windows_and_steps_follow_from_the_tokens() -> None:
    recipe = tiny(batch={"global_batch_tokens": 192}, train_tokens=1000)
    assert recipe.global_batch_size == 6  # 192 tokens / 32 a window
    assert recipe.total_steps == 6  # 5 steps of 192 tokens are 960; the last step is a whole one


@pytest.mark.parametrize(
    ("text", "value"),
    [("6e-4", 6e-4), ("6.0e-4", 6e-4), ("1", 1.0), ("0.5", 0.5)],
)
def test_floats_may_be_written_as_people_write_them(
    text: str, value: float, tmp_path: Path
) -> None:
    recipe = load_recipe(
        str(write_recipe(tmp_path / "r.yaml")), [f"--optimizer.peak_learning_rate={text}"]
    )
    assert recipe.optimizer.peak_learning_rate == value
    assert isinstance(recipe.optimizer.peak_learning_rate, float)


@pytest.mark.parametrize(
    "text", ["17e9", "17.0e9", "1.7e+10", "17_000_000_000", "17000000000", "17000000000.0"]
)
def test_counts_may_be_written_as_people_write_them(text: str, tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path / "r.yaml")), [f"--train_tokens={text}"])
    assert recipe.train_tokens == 17_000_000_000
    assert isinstance(recipe.train_tokens, int)


@given(
    d_model=st.sampled_from([32, 48, 64]),
    seed=st.integers(0, 2**40),
    rate=st.floats(1e-6, 1.0),
    mode=st.sampled_from(["none", "selective", "full"]),
    code_bits=st.sampled_from([None, 16]),
)
def test_a_recipe_written_as_yaml_reads_back_equal(
    d_model: int, seed: int, rate: float, mode: str, code_bits: int | None
) -> None:
    recipe = tiny(
        model={"d_model": d_model, "code_bits": code_bits, "input_embedding": "learned"},
        optimizer={"peak_learning_rate": rate},
        activation_checkpointing={"mode": mode},
        seed=seed,
    )
    assert build_recipe(yaml.safe_load(recipe_to_yaml(recipe)), "again") == recipe


def test_code_bits_default_to_those_the_vocabulary_needs() -> None:
    recipe = tiny(model={"vocab_size": 4096, "code_bits": None})
    assert model_config(recipe.model).code_bits == 12


def test_the_permuted_code_is_drawn_from_the_code_seed_into_the_model_config() -> None:
    configs = [
        model_config(tiny(model={"input_embedding": "permuted_code", "code_seed": seed}).model)
        for seed in (0, 0, 1)
    ]
    codes = [(config.permutation_keys, config.permutation_offset) for config in configs]
    assert codes[0] == codes[1] != codes[2]


def test_the_affine_code_is_drawn_from_the_code_seed_into_the_model_config() -> None:
    configs = [
        model_config(tiny(model={"input_embedding": "affine_code", "code_seed": seed}).model)
        for seed in (0, 0, 1)
    ]
    codes = [(config.affine_rows, config.affine_offset) for config in configs]
    assert codes[0] == codes[1] != codes[2]
    assert len(configs[0].affine_rows) == 16


# Overrides


def test_an_override_replaces_one_key_and_keeps_the_rest(tmp_path: Path) -> None:
    path = str(write_recipe(tmp_path / "r.yaml"))
    before, after = (
        load_recipe(path),
        load_recipe(path, ["--model.num_layers=3", "--seed=9", "--engine=zero2_bf16"]),
    )
    changed = {
        k: v
        for k, v in flatten(recipe_to_dict(after)).items()
        if flatten(recipe_to_dict(before))[k] != v
    }
    assert changed == {"model.num_layers": 3, "seed": 9, "engine": "zero2_bf16"}


def test_an_override_can_set_a_key_whose_section_the_file_leaves_out(tmp_path: Path) -> None:
    recipe = load_recipe(
        str(write_recipe(tmp_path / "r.yaml")), ["--activation_checkpointing.mode=full"]
    )
    assert recipe.activation_checkpointing.mode == "full"


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--model.num_layer=3", "unknown key model.num_layer; did you mean model.num_layers?"),
        ("--sede=3", "unknown key sede; did you mean seed?"),
        ("--verbose", "--verbose: not a known flag; a recipe key is set as --dotted.key=value"),
        ("stray", "stray: not a known flag"),
        ("--seed.x=1", "seed is a value, not a section"),
        ("--model=3", "model: got 3; expected keys and values"),
        ("--seed=[1", "--seed=[1"),
        ("--seed=", "--seed=: has no value behind the sign =; give one"),
    ],
)
def test_a_bad_override_is_refused(argument: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(str(write_recipe(tmp_path / "r.yaml", seed=1)), [argument])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--optimizer.lr=1e-3", "optimizer.peak_learning_rate"),
        ("--lr=1e-3", "optimizer.peak_learning_rate"),
        ("--learning-rate=1e-3", "optimizer.peak_learning_rate"),
        ("--batch_size=8", "batch.global_batch_tokens"),
        ("--per_device_train_batch_size=8", "batch.micro_batch_size"),
        ("--model.n_layer=2", "model.num_layers"),
        ("--model.hidden_size=64", "model.d_model"),
        ("--block_size=64", "model.seq_len"),
        ("--max_iters=10", "train_tokens"),
        ("--schedule.warmup_iters=10", "schedule.warmup_steps"),
        ("--max_grad_norm=1", "optimizer.gradient_clipping"),
        ("--eval_interval=10", "validation.every_steps"),
        ("--gradient_checkpointing=true", "activation_checkpointing.mode"),
        ("--bf16=true", "engine"),
    ],
)
def test_a_key_by_its_name_elsewhere_is_told_its_name_here(
    typed: str, ours: str, tmp_path: Path
) -> None:
    path = str(write_recipe(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match=f"unknown key .*; did you mean {re.escape(ours)}\\?$"):
        load_recipe(path, [typed])
    without_sign = typed.partition("=")[0]  # as other commands have it: --lr 1e-3
    with pytest.raises(
        UserError, match=f"not a known flag; a recipe key is set as --{re.escape(ours)}=value"
    ):
        load_recipe(path, [without_sign, "1e-3"])


def test_names_elsewhere_name_keys_that_there_are_and_hide_none() -> None:
    keys = dotted_keys(Recipe)
    assert set(ELSEWHERE) <= set(keys)
    assert not {key.rpartition(".")[2] for key in keys} & set(OURS)
    assert sum(map(len, ELSEWHERE.values())) == len(OURS)  # each name elsewhere means one key here


def test_a_recipe_s_file_that_is_not_there_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    write_recipe(tmp_path / "base.yaml")
    near = re.escape(str(tmp_path / "base.yaml"))
    for name, says in {
        str(tmp_path / "bas.yaml"): f"did you mean {near}\\?",
        str(tmp_path / "Base.yaml"): f"did you mean {near}\\?",
        str(
            tmp_path / "quickstart.yaml"
        ): "did you mean the shipped quickstart, without \\.yaml\\?",
        str(
            tmp_path / "none" / "quickstrat.yaml"
        ): "did you mean quickstart\\? \\(shipped\\), or give the path",
        "quickstrat": r"did you mean quickstart\? \(or give a \.yaml file\)",
        str(
            tmp_path / "xyz.yaml"
        ): r"expected one of .*quickstart.* \(shipped\), or give the path of a \.yaml file",
    }.items():
        with pytest.raises(UserError, match=f"--recipe {re.escape(name)}: no such file; {says}"):
            load_recipe(name)


YAML_TEXTS = st.text(max_size=8) | st.sampled_from(
    [
        "1e400",
        "9" * 400,
        ".inf",
        "-.inf",
        ".nan",
        "2026-01-01",
        "!!binary aGk=",
        "!!set {1}",
        "{a: 1}",
        "[1]",
        "&a [*a]",
    ]
)


@given(key=st.sampled_from(sorted(flatten(recipe_to_dict(tiny())))), text=YAML_TEXTS)
def test_whatever_an_override_says_it_makes_a_recipe_or_one_line(key: str, text: str) -> None:
    content = tiny_recipe_content()
    with suppress(UserError):
        apply_overrides(content, [f"--{key}={text}"])
        assert isinstance(build_recipe(content, "tiny.yaml"), Recipe)


# Bad recipes


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"model": {"num_layer": 1}},
            "tiny.yaml: unknown key model.num_layer; did you mean model.num_layers?",
        ),
        ({"num_layers": 1}, "unknown key num_layers; did you mean model.num_layers?"),
        ({"modle": {}}, "unknown key modle; did you mean model?"),
        ({"mode": {"d_model": 64}}, "unknown key mode; did you mean model?"),
        (
            {"batch": {"micro_batch": 1}},
            "unknown key batch.micro_batch; did you mean batch.micro_batch_size?",
        ),
        ({"optimizer": {"weigth_decay": 0}}, "did you mean optimizer.weight_decay?"),
        ({"xyzzy": 1}, "unknown key xyzzy; expected one of activation_checkpointing, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(
    sections: dict[str, Any], says: str
) -> None:
    assert says in refusal(**sections)


def test_code_bits_that_do_not_divide_the_width_are_refused_with_the_next_that_do() -> None:
    assert refusal(
        model={"vocab_size": 32_000, "d_model": 1024, "num_heads": 8, "code_bits": None}
    ) == (
        "tiny.yaml: model.code_bits 15 does not divide model.d_model 1024; set model.code_bits to "
        "16, the next that does"
    )
    assert "change model.d_model" in refusal(model={"d_model": 134, "num_heads": 1, "code_bits": 9})


@given(
    st.integers(2, 65_536),
    st.integers(1, 40).map(lambda half: 8 * half),
    st.none() | st.integers(1, 70),
)
def test_a_recipe_is_accepted_exactly_when_its_code_tells_ids_apart_and_tiles_the_width(
    vocab_size: int, d_model: int, code_bits: int | None
) -> None:
    needed = next(bits for bits in range(1, 17) if 2**bits >= vocab_size)
    bits = needed if code_bits is None else code_bits
    model = {"vocab_size": vocab_size, "d_model": d_model, "num_heads": 4, "code_bits": code_bits}
    if needed <= bits <= 62 and d_model % bits == 0:
        assert model_config(tiny(model=model).model).code_bits == bits
    else:
        assert "model.code_bits" in refusal(model=model)


def test_a_code_too_narrow_for_the_vocabulary_is_refused_with_the_bits_it_needs() -> None:
    assert refusal(model={"vocab_size": 512, "code_bits": 8}) == (
        "tiny.yaml: model.code_bits 8 cannot tell 512 ids apart; set it to 9 or more"
    )


# 48 / 5 = 9.6; 48 / 16 = 3 and 48 / 48 = 1 are odd
@pytest.mark.parametrize("num_heads", [5, 16, 48])
def test_a_width_that_heads_do_not_divide_evenly_is_refused(num_heads: int) -> None:
    message = refusal(model={"num_heads": num_heads})
    assert f"model.d_model 48 over model.num_heads {num_heads} is {48 / num_heads:g}" in message


def test_a_batch_that_is_not_whole_windows_is_refused_with_the_nearest() -> None:
    assert (
        "not a whole number of windows of model.seq_len 32; the nearest are 96 and 128"
        in refusal(batch={"global_batch_tokens": 100})
    )
    assert "the nearest are 32" in refusal(batch={"global_batch_tokens": 10})


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"vocab_size": 65_537}}, "model.vocab_size: got 65537"),
        ({"model": {"vocab_size": 1}}, "model.vocab_size: got 1"),
        ({"model": {"num_layers": 2.5}}, "model.num_layers: got 2.5"),
        ({"model": {"num_layers": "two"}}, "model.num_layers: got 'two'"),
        ({"model": {"num_layers": True}}, "model.num_layers: got True"),
        ({"model": {"input_embedding": "hashed"}}, "model.input_embedding: got 'hashed'"),
        ({"optimizer": {"peak_learning_rate": 0}}, "optimizer.peak_learning_rate: got 0"),
        (
            {"optimizer": {"peak_learning_rate": float("inf")}},
            "optimizer.peak_learning_rate: got inf",
        ),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2: got 1; expected a number below 1"),
        ({"optimizer": {"weight_decay": float("nan")}}, "optimizer.weight_decay"),
        ({"checkpoints": {"every_steps": 0}}, "checkpoints.every_steps: got 0"),
        ({"checkpoints": {"keep_last": 0}}, "checkpoints.keep_last: got 0"),
        (
            {"activation_checkpointing": {"mode": "some"}},
            "activation_checkpointing.mode: got 'some'",
        ),
        ({"seed": -1}, "seed: got -1"),
        ({"deterministic": "maybe"}, "deterministic: got 'maybe'"),
        ({"train_tokens": "many"}, "train_tokens: got 'many'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(sections: dict[str, Any], says: str) -> None:
    assert says in refusal(**sections)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"warmup_steps": 21}, "21 steps of warm-up are longer than the run of 20 steps"),
        (
            {"kind": "wsd", "warmup_steps": 8, "decay_steps": 13},
            "8 steps of warm-up and 13 of decay are longer than the run of 20 steps",
        ),
        ({"decay_steps": 3}, "schedule.decay_steps belongs to schedule.kind wsd, not cosine"),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(schedule: dict[str, Any], says: str) -> None:
    assert says in refusal(schedule=schedule)


@pytest.mark.parametrize(
    "section", ["model", "batch", "optimizer", "validation", "checkpoints", "train_tokens"]
)
def test_a_missing_part_is_named(section: str) -> None:
    content = tiny_recipe_content()
    del content[section]
    with pytest.raises(UserError, match=f"^tiny.yaml: {section} is missing$"):
        build_recipe(content, "tiny.yaml")


def test_a_missing_key_of_a_section_is_named() -> None:
    content = tiny_recipe_content()
    del content["model"]["d_model"]
    with pytest.raises(UserError, match=r"^tiny.yaml: model.d_model is missing$"):
        build_recipe(content, "tiny.yaml")


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    for text, says in (
        ("[1, 2]", "not a recipe"),
        ("a: [", "not valid YAML"),
        ("", "not a recipe"),
    ):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            load_recipe(str(path))


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"paper_binary: no such file; did you mean paper_binary_code\?"
    ):
        load_recipe("paper_binary")
    with pytest.raises(UserError, match="no such file"):
        load_recipe(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(("interval", "near"), [(12, "10 and 15"), (3, "5")])
def test_exports_of_steps_without_a_checkpoint_are_refused(interval: int, near: str) -> None:
    said = refusal(checkpoints={"every_steps": 5, "export_every_steps": interval})
    assert f"checkpoints.export_every_steps {interval} is no multiple of" in said
    assert said.endswith(f"the nearest are {near}")


# Resuming


CHANGEABLE = {
    "batch.micro_batch_size", "compile", "loss_head", "data.stage_dir",
    "data.verify", "engine",
    "activation_checkpointing.mode", "activation_checkpointing.every_n_layers",
    "validation.every_steps", "validation.eval_tokens",
    "checkpoints.every_steps", "checkpoints.keep_last", "checkpoints.keep_every",
    "checkpoints.export_every_steps", "checkpoints.export_architecture",
    "checkpoints.export_dtype", "checkpoints.export_keep_last",
    "bad_steps.policy", "bad_steps.spike_deviations", "bad_steps.max_in_a_row",
    "stalls.after_medians", "stalls.after_s", "log.sinks", "log.every_s", "log.every_steps",
    "log.prompts", "log.sample_tokens",
}  # fmt: skip


def test_a_resumed_run_may_change_intervals_and_is_refused_anything_else_with_both_values() -> None:
    saved = recipe_to_dict(tiny())
    for key in flatten(saved):
        *sections, last = key.split(".")
        changed = recipe_to_dict(tiny())
        place = changed[sections[0]] if sections else changed
        place[last] = "other"
        if key in CHANGEABLE:
            refuse_changes(saved, changed, MAY_CHANGE_ON_RESUME, "recipe.yaml")
        else:
            with pytest.raises(UserError) as caught:
                refuse_changes(saved, changed, MAY_CHANGE_ON_RESUME, "recipe.yaml")
            assert f"started with {key}={flatten(saved)[key]!r}, got 'other'" in str(caught.value)


def test_a_key_that_appears_or_disappears_is_a_change() -> None:
    for saved, now in (({"a": 1}, {"a": 1, "b": 2}), ({"a": 1, "b": 2}, {"a": 1})):
        with pytest.raises(UserError, match=r"with b="):
            refuse_changes(saved, now, frozenset(), "here")
