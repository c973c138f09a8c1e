import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config.recipe import ModelRecipe, OptimizerRecipe, ScheduleRecipe
from pretrain.config.schedule import learning_rate
from pretrain.engine.optim import build_optimizer
from pretrain.model.build import model_config
from pretrain.model.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM

schedules = st.builds(
    ScheduleRecipe, warmup_fraction=st.floats(0, 0.99), final_fraction=st.floats(0, 1)
)


def rates(total_steps: int, peak: float, schedule: ScheduleRecipe) -> list[float]:
    return [learning_rate(step, total_steps, peak, schedule) for step in range(total_steps)]


def test_ten_steps_by_hand() -> None:
    by_hand = [0.5, 1.0]  # warm-up: a fifth of ten steps
    # then half a cosine, to 0.2
    by_hand += [0.2 + 0.8 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(1, 9)]
    schedule = ScheduleRecipe(warmup_fraction=0.2, final_fraction=0.2)
    assert rates(10, 1.0, schedule) == pytest.approx(by_hand)


def test_the_paper_s_schedule_peaks_at_step_325_and_ends_at_a_tenth() -> None:
    values = rates(32_425, 6e-4, ScheduleRecipe(warmup_fraction=0.01, final_fraction=0.1))
    assert values[0] == pytest.approx(6e-4 / 325)  # 1 % of 32,425 steps, rounded up
    assert max(values) == values[324] == pytest.approx(6e-4)
    assert values[-1] == pytest.approx(6e-5)
    # half-way between, half-way down
    assert values[325 + 16_049] == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-3)


@given(st.integers(1, 300), st.floats(1e-6, 1.0), schedules)
def test_the_rate_rises_to_the_peak_then_falls_to_its_final_fraction(
    total_steps: int, peak: float, schedule: ScheduleRecipe
) -> None:
    values = rates(total_steps, peak, schedule)
    warmup_steps = math.ceil(schedule.warmup_fraction * total_steps)
    rising, falling = values[:warmup_steps], values[warmup_steps:]
    assert all(0 < value <= peak * (1 + 1e-12) for value in rising)
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if rising:
        assert rising[-1] == pytest.approx(peak)
    if falling:
        assert falling[0] <= peak
        assert falling[-1] == pytest.approx(peak * schedule.final_fraction, abs=1e-15)


def test_linear_falls_in_a_line_and_constant_stays() -> None:
    linear = ScheduleRecipe(kind="linear", warmup_fraction=0.2, final_fraction=0.2)
    assert rates(10, 1.0, linear) == pytest.approx(
        [0.5, 1.0, *(1.0 - 0.1 * k for k in range(1, 9))]
    )
    constant = ScheduleRecipe(kind="constant", warmup_steps=4)
    assert rates(10, 1.0, constant) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])


def test_wsd_is_stable_until_its_decay() -> None:
    by_steps = ScheduleRecipe(kind="wsd", warmup_steps=2, decay_steps=4, final_fraction=0.0)
    by_fraction = ScheduleRecipe(
        kind="wsd", warmup_fraction=0.2, decay_fraction=0.4, final_fraction=0.0
    )
    expected = [0.5, *[1.0] * 5, 0.75, 0.5, 0.25, 0.0]
    assert rates(10, 1.0, by_steps) == rates(10, 1.0, by_fraction) == pytest.approx(expected)


@given(st.integers(3, 200), st.integers(3, 200))
def test_two_lengths_of_a_wsd_schedule_agree_until_the_shorter_one_s_decay(
    first: int, second: int
) -> None:
    schedule = ScheduleRecipe(kind="wsd", warmup_steps=1, decay_steps=2)
    shared = min(first, second) - 2
    assert rates(first, 1.0, schedule)[:shared] == rates(second, 1.0, schedule)[:shared]


def test_matrices_decay_and_vectors_do_not() -> None:
    recipe = ModelRecipe(
        vocab_size=60, d_model=24, num_layers=2, num_heads=2, seq_len=8, input_embedding="learned"
    )
    module = LanguageModelLoss(TableFreeForCausalLM(model_config(recipe)))
    optimizer = build_optimizer(
        module,
        OptimizerRecipe(peak_learning_rate=3e-4, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2),
    )
    decay_of = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in module.named_parameters():
        vector = name.endswith("bias") or "norm" in name
        assert decay_of.pop(id(parameter)) == (0.0 if vector else 0.2), name
    assert not decay_of
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (
            3e-4,
            (0.8, 0.9),
            1e-6,
            True,
        )


def test_one_step_is_adamw_by_hand() -> None:
    module = torch.nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.fill_(2.0)
    optimizer = build_optimizer(module, OptimizerRecipe(peak_learning_rate=0.5, weight_decay=0.1))
    # both gradients are 1, so Adam's first step is -1 x rate
    module(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert module.weight.item() == pytest.approx(2.0 * (1 - 0.5 * 0.1) - 0.5)
    assert module.bias.item() == pytest.approx(2.0 - 0.5)
