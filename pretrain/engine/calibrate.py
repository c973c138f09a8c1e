"""What a step costs on this device: seconds of a window through blocks and loss head, and of a
parameter's update.

`python -m pretrain.plan --calibrate` asks. The recipe's own shapes run on fewer layers, and on
fewer windows at a time where a micro-batch would take too long: time is linear in layers and, from
a window on, nearly so in windows.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from data_prep.errors import UserError
from pretrain.config.recipe import Recipe
from pretrain.costs.devices import DEVICES, Device, find_device
from pretrain.costs.step_time import Costs
from pretrain.distributed.devices import check_kernels
from pretrain.engine.optim import build_optimizer
from pretrain.model.activation_checkpointing import apply_activation_checkpointing
from pretrain.model.build import model_config
from pretrain.model.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM

# the longest that one micro-batch through one layer may take before it is made smaller
ONE_PASS_S = 2.0


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def medians_in_turns(
    actions: Sequence[Callable[[], object]], device: torch.device, budget_s: float
) -> list[float]:
    """Seconds of each action, for about that long together, after a round to warm up."""
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < 4 or time.perf_counter() - started < budget_s:
        rounds.append([timed(action, device) for action in actions])
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)]


def passes(
    recipe: Recipe, layers: int, windows: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """A forward and backward pass over random ids of a model of that many layers."""
    model = TableFreeForCausalLM(model_config(replace(recipe.model, num_layers=layers)))  # type: ignore[type-var]
    checkpointing = recipe.activation_checkpointing
    apply_activation_checkpointing(model, checkpointing.mode, checkpointing.every_n_layers)
    module = LanguageModelLoss(model, recipe.loss_head).to(device, dtype)
    ids_BT = torch.randint(
        recipe.model.vocab_size, (windows, recipe.model.seq_len + 1), device=device
    )

    def run() -> None:
        module(ids_BT[:, :-1], ids_BT[:, 1:]).backward()
        module.zero_grad()

    return run


def seconds_of_a_window(
    recipe: Recipe, dtype: torch.dtype, device: torch.device, budget_s: float
) -> float:
    """From passes over one layer and over two, in turns: the loss head once, a layer as often as
    the recipe says.
    """
    run = passes(recipe, 1, 1, dtype, device)
    run()
    windows = max(1, min(recipe.batch.micro_batch_size, int(ONE_PASS_S / timed(run, device))))
    one, two = medians_in_turns(
        [passes(recipe, layers, windows, dtype, device) for layers in (1, 2)], device, budget_s
    )
    return (one + (recipe.model.num_layers - 1) * max(0.0, two - one)) / windows


def seconds_of_a_parameter(
    recipe: Recipe, device: torch.device, budget_s: float
) -> tuple[float, float]:
    """The engine's work on gradients: into a bucket and out of it; gathered, normed, clipped,
    and AdamW.
    """
    module = torch.nn.Linear(1024, 16_384, bias=False, device=device)
    optimizer, weight = build_optimizer(module, recipe.optimizer), module.weight
    gradient, low_precision = torch.ones_like(weight), torch.empty_like(weight)

    def reduce() -> None:
        low_precision.copy_(gradient.clone().div_(1.0))

    def update() -> None:
        weight.grad = gradient.clone()
        weight.grad.double().norm()
        weight.grad.mul_(1.0)
        optimizer.step()
        low_precision.copy_(weight.detach())

    with torch.no_grad():
        reduced, updated = medians_in_turns([reduce, update], device, budget_s)
    return reduced / weight.numel(), updated / weight.numel()


def calibrate(
    recipe: Recipe,
    known: Device | None,
    *,
    low_precision: bool,
    ranks: int = 1,
    budget_s: float = 24.0,
) -> Costs:
    """Measure this machine's device, or one of so many ranks' part of its CPU (None), for about
    that long, besides building the models. Raises UserError where this machine has another device
    than the known one.
    """
    has_gpu = torch.cuda.is_available()
    here = torch.cuda.get_device_name() if has_gpu else "cpu"
    if known is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    # a device with figures of the user's own may be this one
    elif not has_gpu or (known in DEVICES and find_device(here) != known):
        raise UserError(
            f"--calibrate measures this machine's device, {here}, which is not {known.name}; run "
            "it there"
        )
    device, dtype = (
        torch.device("cuda" if known else "cpu"),
        torch.bfloat16 if low_precision else torch.float32,
    )
    check_kernels(device.type, is_bf16=low_precision)
    window = seconds_of_a_window(recipe, dtype, device, 0.8 * budget_s)
    reduced, updated = seconds_of_a_parameter(recipe, device, 0.2 * budget_s)
    return Costs(window=window, reduced_parameter=reduced, updated_parameter=updated)
