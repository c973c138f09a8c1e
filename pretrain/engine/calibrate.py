"""What a step costs on this device, measured: `python -m pretrain.plan --calibrate` asks.

Measured are seconds of a window through blocks and loss head, and of a parameter's update. The
recipe's own shapes run on fewer layers, and on fewer windows at a time where a micro-batch would
take too long: time is linear in layers and, from a window on, nearly so in windows.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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

# The longest that one micro-batch through one layer may take before it is made smaller.
ONE_PASS_S = 2.0
# The update is timed on a matrix of this many columns and rows.
COLUMNS = 1024
ROWS = 16_384


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, on what, and for how long."""

    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    budget_s: float


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
    seconds: list[list[float]] = [[] for _ in actions]
    rounds = 0
    started = time.perf_counter()
    while rounds < 4 or time.perf_counter() - started < budget_s:
        for action, own in zip(actions, seconds, strict=True):
            own.append(timed(action, device))
        rounds += 1
    return [statistics.median(own[1:]) for own in seconds]


def passes(bench: Bench, layers: int, windows: int) -> Callable[[], None]:
    """A forward and backward pass over random ids of a model of that many layers."""
    recipe = bench.recipe
    smaller = replace(recipe.model, num_layers=layers)
    model = TableFreeForCausalLM(model_config(smaller))
    checkpointing = recipe.activation_checkpointing
    apply_activation_checkpointing(model, checkpointing.mode, checkpointing.every_n_layers)
    module = LanguageModelLoss(model, recipe.loss_head).to(bench.device, bench.dtype)
    shape = (windows, recipe.model.seq_len + 1)
    ids_BT = torch.randint(recipe.model.vocab_size, shape, device=bench.device)
    inputs_BT = ids_BT[:, :-1]
    targets_BT = ids_BT[:, 1:]

    def run() -> None:
        module(inputs_BT, targets_BT).backward()
        module.zero_grad()

    return run


def seconds_of_a_window(bench: Bench) -> float:
    """From passes over one layer and over two, in turns.

    The loss head counts once, a layer as often as the recipe says.
    """
    one_window = passes(bench, layers=1, windows=1)
    one_window()  # to warm up
    fitting = int(ONE_PASS_S / timed(one_window, bench.device))
    windows = max(1, min(bench.recipe.batch.micro_batch_size, fitting))
    actions = [passes(bench, 1, windows), passes(bench, 2, windows)]
    one_layer, two_layers = medians_in_turns(actions, bench.device, bench.budget_s)
    each_layer = max(0.0, two_layers - one_layer)
    more_layers = bench.recipe.model.num_layers - 1
    return (one_layer + more_layers * each_layer) / windows


def seconds_of_a_parameter(bench: Bench) -> tuple[float, float]:
    """The engine's work on a gradient, each micro-step and each update.

    Into a bucket and out of it; then gathered, normed, clipped, and AdamW.
    """
    module = torch.nn.Linear(COLUMNS, ROWS, bias=False, device=bench.device)
    optimizer = build_optimizer(module, bench.recipe.optimizer)
    weight = module.weight
    gradient = torch.ones_like(weight)
    low_precision = torch.empty_like(weight)

    def reduce() -> None:
        bucket = gradient.clone()
        low_precision.copy_(bucket.div_(1.0))

    def update() -> None:
        weight.grad = gradient.clone()
        # What DeepSpeed asks for: only the time that it takes is of interest here.
        weight.grad.double().norm()
        weight.grad.mul_(1.0)  # as clipping does
        optimizer.step()
        low_precision.copy_(weight.detach())

    with torch.no_grad():
        reduced, updated = medians_in_turns([reduce, update], bench.device, bench.budget_s)
    return reduced / weight.numel(), updated / weight.numel()


def calibrate(
    recipe: Recipe,
    known: Device | None,
    *,
    low_precision: bool,
    ranks: int = 1,
    budget_s: float = 24.0,
) -> Costs:
    """Measure this machine's device, or one of so many ranks' part of its CPU (None).

    It takes about `budget_s`, besides building the models. Raises UserError where this machine has
    another device than the known one.
    """
    check_device(known)
    if known is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    device = torch.device("cuda" if known else "cpu")
    check_kernels(device.type, is_bf16=low_precision)
    dtype = torch.bfloat16 if low_precision else torch.float32
    # Most of the time goes to the windows, which weigh most in a step.
    of_window = Bench(recipe=recipe, device=device, dtype=dtype, budget_s=0.8 * budget_s)
    window = seconds_of_a_window(of_window)
    of_parameter = replace(of_window, budget_s=0.2 * budget_s)
    reduced, updated = seconds_of_a_parameter(of_parameter)
    return Costs(window=window, reduced_parameter=reduced, updated_parameter=updated)


def check_device(known: Device | None) -> None:
    """Raise UserError unless this machine has the device; it has a CPU (None) in any case."""
    if known is None:
        return
    here = "cpu"
    is_here = False
    if torch.cuda.is_available():
        here = torch.cuda.get_device_name()
        # A device with figures of the user's own may be this one.
        is_here = known not in DEVICES or find_device(here) == known
    if not is_here:
        raise UserError(
            f"--calibrate measures this machine's device, {here}, which is not {known.name}; run "
            "it there"
        )
