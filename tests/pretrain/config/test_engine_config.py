import json
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from hypothesis import given
from hypothesis import strategies as st
from support.runs import tiny_recipe_content

from data_prep.errors import UserError
from pretrain.config.changes import ENGINE_MAY_CHANGE_ON_RESUME, refuse_changes
from pretrain.config.deepspeed import (
    DS_CONFIGS_DIR,
    DTYPE,
    FLAG,
    KNOWN_KEYS,
    OWNED_BY_RECIPE,
    SECTION,
    SIZE,
    accumulation_steps,
    load_engine_config,
    merge_config,
)
from pretrain.config.load import build_recipe
from pretrain.config.recipe import Recipe


def recipe_of(**sections: Any) -> Recipe:
    return build_recipe(tiny_recipe_content(**sections), "tiny.yaml")


def json_refusal(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "engine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_engine_config(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


STAGE_2 = {"zero_optimization": {"stage": 2}}


def zero_2(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **keys}}


@pytest.mark.parametrize("path", sorted(DS_CONFIGS_DIR.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_engine_is_zero2_with_fp32_accumulation_and_reduction(path: Path) -> None:
    config = load_engine_config(path.stem)
    assert config["zero_optimization"]["stage"] == 2
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"


@pytest.mark.parametrize("key", sorted(OWNED_BY_RECIPE))
def test_a_json_that_repeats_the_recipe_is_refused_with_the_key_s_home(
    key: str, tmp_path: Path
) -> None:
    message = json_refusal(tmp_path, {**STAGE_2, key: 1})
    assert f"{key} belongs to the recipe ({OWNED_BY_RECIPE[key]}); remove it here" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {**STAGE_2, "bf16": {"enabled": "auto"}},
            'bf16.enabled is "auto", expected true or false',
        ),
        (
            zero_2(reduce_bucket_size="auto"),
            'reduce_bucket_size is "auto", expected a whole number, 1 or more',
        ),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, expected 0, 1 or 2"),
        (
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage is true, expected 0, 1 or 2",
        ),
        (
            {"zero_optimization": {"stage": 2.0}},
            "zero_optimization.stage is 2.0, expected 0, 1 or 2",
        ),
        (
            zero_2(allgather_bucket_size=7),
            "allgather_bucket_size is 7, expected an even number, 2 or more",
        ),
        (
            zero_2(allgather_bucket_size=0),
            "allgather_bucket_size is 0, expected an even number, 2 or more",
        ),
        ({"zero_optimization": {}}, "zero_optimization.stage is missing, expected 0, 1 or 2"),
        ({}, "zero_optimization is missing, expected a JSON object"),
        (
            {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
            "stage is 0, which is for fp32 alone",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer; write 1 or 2",
        ),
        (
            {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}},
            "stage is 0, which is for fp32 alone",
        ),
        ({"zero_optimization": 2}, "zero_optimization is 2, expected a JSON object"),
        (
            {**STAGE_2, "zero_optimisation": {}},
            "unknown key zero_optimisation; did you mean zero_optimization?",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucketsize": 5}},
            "unknown key zero_optimization.reduce_bucketsize; did you mean reduce_bucket_size?",
        ),
        ({**STAGE_2, "bf16": {}}, "bf16.enabled is missing, expected true or false"),
        (
            {**STAGE_2, "bf16": {"enabled": True, "bf16_optimizer_states": True}},
            "key bf16.bf16_optimizer_states",
        ),
        (
            zero_2(offload_optimizer={}),
            'zero_optimization.offload_optimizer.device is missing, expected "cpu"',
        ),
        (
            zero_2(offload_optimizer={"device": "nvme"}),
            'offload_optimizer.device is "nvme", expected "cpu"',
        ),
        (
            zero_2(offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "key zero_optimization.offload_optimizer.ratio",
        ),
        (
            zero_2(offload_optimizer="cpu"),
            'zero_optimization.offload_optimizer is "cpu", expected a JSON object',
        ),
        (
            {**zero_2(offload_optimizer={"device": "cpu"}), "zero_force_ds_cpu_optimizer": True},
            "zero_force_ds_cpu_optimizer is true, expected false: the optimizer is torch's AdamW",
        ),
        (
            zero_2(round_robin_gradients=True),
            "gradients is true, expected false: true would make wrong checkpoints on several ranks",
        ),
        ({**STAGE_2, "prescale_gradients": True}, "unknown key prescale_gradients"),
        ({**STAGE_2, "fp16": {"enabled": True}}, "unknown key fp16; did you mean bf16?"),
        ("{", "not valid JSON"),
        ("[2]", "expected a JSON object"),
    ],
)
def test_a_json_that_this_pipeline_cannot_honour_is_refused(
    content: Any, says: str, tmp_path: Path
) -> None:
    assert says in json_refusal(tmp_path, content)


VALUES = {  # of each kind: what it takes, and what it refuses
    FLAG: ([True, False], ["yes", "no", "true", 1, 0, 2.0, None, [], {}]),
    SIZE: (
        [1, 50_000_000, 5e8],
        ["abc", "5e8", 0, 0.0, -1, -5e8, 1.5, float("inf"), float("nan"), True, None, [5], {}],
    ),
    DTYPE: (
        ["fp32", "bf16"],
        ["float", "float32", "fp64", "fp16", "FP32", 32, True, None, ["fp32"]],
    ),
    SECTION: ([], ["x", 1, True, None, [{}]]),
}


def json_with(section: str, key: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    place = config
    for name in filter(None, section.split(".")):
        place = place.setdefault(name, {"device": "cpu"} if name == "offload_optimizer" else {})
    place[key] = value
    return config


@pytest.mark.parametrize(
    ("section", "key", "kind"),
    [
        (s, key, kind)
        for s, keys in KNOWN_KEYS.items()
        for key, kind in keys.items()
        if kind in VALUES
    ],
)
def test_each_key_takes_the_values_of_its_kind_and_refuses_others_with_one_line(
    section: str, key: str, kind: tuple[str, str], tmp_path: Path
) -> None:
    good, bad = VALUES[kind]
    path = tmp_path / "good.json"
    for value in good:
        path.write_text(json.dumps(json_with(section, key, value)))
        assert load_engine_config(str(path)) == json_with(section, key, value)
    for value in bad:
        message = json_refusal(tmp_path, json_with(section, key, value))
        name = f"{section}.{key}".lstrip(".")
        assert (
            message
            == f"{tmp_path / 'engine.json'}: {name} is {json.dumps(value)}, expected {kind[0]}"
        )


def test_an_engine_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"engine zero2_bf61: no such .*; did you mean zero2_bf16\?"
    ):
        load_engine_config("zero2_bf61")
    with pytest.raises(UserError, match=r"/absent\.json: no such file"):
        load_engine_config("/absent.json")


def test_the_merged_configuration_is_the_json_and_what_the_recipe_owns() -> None:
    recipe = recipe_of(batch={"micro_batch_size": 1}, optimizer={"gradient_clipping": 0.7})
    engine_config = load_engine_config("zero2_fp32")
    merged = merge_config(recipe, engine_config, world_size=2)
    added = {key: value for key, value in merged.items() if key not in engine_config}
    assert added == {
        "train_batch_size": 6,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 3,  # 6 windows / (2 ranks x 1)
        "gradient_clipping": 0.7,
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert (
        {key: merged[key] for key in engine_config}
        == engine_config
        == load_engine_config("zero2_fp32")
    )


def test_accumulation_and_reduction_are_fp32_unless_the_json_says_otherwise() -> None:
    silent = merge_config(recipe_of(), STAGE_2, world_size=1)
    assert silent["data_types"] == {"grad_accum_dtype": "fp32"}
    assert silent["communication_data_type"] == "fp32"
    assert silent["zero_force_ds_cpu_optimizer"] is False
    asked = merge_config(recipe_of(), {**STAGE_2, "communication_data_type": "bf16"}, world_size=1)
    assert asked["communication_data_type"] == "bf16"


def test_a_bf16_step_with_infinite_gradients_is_not_passed_over_in_silence_by_deepspeed() -> None:
    merged = merge_config(recipe_of(), load_engine_config("zero2_bf16"), world_size=1)
    assert merged["bf16"] == {"enabled": True, "check_grad_overflow": False}


def test_a_run_goes_on_that_an_earlier_version_saved_with_or_without_keys_that_change_no_step() -> (
    None
):
    now = merge_config(recipe_of(), load_engine_config("zero2_bf16"), world_size=1)
    saved = {**now, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True}
    del saved["zero_force_ds_cpu_optimizer"]
    refuse_changes(saved, now, ENGINE_MAY_CHANGE_ON_RESUME, "deepspeed.json")
    with pytest.raises(UserError, match="communication_data_type='bf16', got 'fp32'"):
        refuse_changes(
            {**saved, "communication_data_type": "bf16"},
            now,
            ENGINE_MAY_CHANGE_ON_RESUME,
            "deepspeed.json",
        )


# Dividing the batch


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do() -> None:
    recipe = recipe_of(batch={"global_batch_tokens": 6 * 32, "micro_batch_size": 2})
    with pytest.raises(UserError) as caught:
        accumulation_steps(recipe, world_size=2)
    assert str(caught.value) == (
        "a step of 6 windows does not divide over 2 ranks x micro-batch 2; nearest that do: "
        "batch.global_batch_tokens 128 or 256, or batch.micro_batch_size 1, or 1 of the ranks"
    )


@given(
    windows=st.integers(1, 60), micro_batch_size=st.integers(1, 12), world_size=st.integers(1, 16)
)
def test_a_batch_divides_into_whole_micro_batches_or_every_suggestion_does(
    windows: int, micro_batch_size: int, world_size: int
) -> None:
    recipe = recipe_of(
        batch={"global_batch_tokens": windows * 32, "micro_batch_size": micro_batch_size}
    )
    if windows % (micro_batch_size * world_size) == 0:
        assert accumulation_steps(recipe, world_size) * micro_batch_size * world_size == windows
        return
    with pytest.raises(UserError) as caught:
        accumulation_steps(recipe, world_size)
    text = str(caught.value).partition("nearest that do:")[2]
    tokens = re.search(r"global_batch_tokens (\d+)(?: or (\d+))?", text)
    assert tokens is not None
    for suggested in filter(None, tokens.groups()):
        changed = recipe_of(
            batch={"global_batch_tokens": int(suggested), "micro_batch_size": micro_batch_size}
        )
        accumulation_steps(changed, world_size)
        assert abs(int(suggested) - windows * 32) < 32 * micro_batch_size * world_size
    if micro := re.search(r"micro_batch_size (\d+)", text):
        changed = recipe_of(
            batch={"global_batch_tokens": windows * 32, "micro_batch_size": int(micro[1])}
        )
        accumulation_steps(changed, world_size)
    if ranks := re.search(r"(\d+) of the ranks$", text):
        accumulation_steps(recipe, int(ranks[1]))


def test_every_key_that_is_let_through_is_one_of_deepspeed_s() -> None:
    assert set(DeepSpeedZeroConfig.model_fields) >= set(KNOWN_KEYS["zero_optimization"])
    offload = set(KNOWN_KEYS["zero_optimization.offload_optimizer"])
    assert set(DeepSpeedZeroOffloadOptimizerConfig.model_fields) >= offload
    assert set(DeepSpeedBF16Config.model_fields) >= {*KNOWN_KEYS["bf16"], "check_grad_overflow"}
