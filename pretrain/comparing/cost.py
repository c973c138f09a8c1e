"""What a comparison will take, before it starts: by the arithmetic of pretrain/costs. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.errors import UserError, nearest
from pretrain.comparing.matrix import Cell, Matrix, show_value
from pretrain.config.deepspeed import load_engine_config, merge_config
from pretrain.config.recipe import Recipe
from pretrain.costs.devices import DEVICES, Device, find_device
from pretrain.costs.fit import check_it_fits
from pretrain.costs.flops import count_parameters, flops_per_token
from pretrain.costs.memory import sizes_of
from pretrain.costs.step_time import ASSUMED_MFU, assumed_costs, parse_interconnect, scale_to
from pretrain.reporting.words import large
from pretrain.view.templates import render

NETWORK = "ndr"  # as pretrain.plan assumes; of one node it is not used
SECONDS_OF_AN_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What cells are to be trained on, one after another."""

    device: Device
    gpus: int
    price_per_gpu_hour: float | None


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """A cell before it is trained."""

    name: str
    parameters: int
    tokens: int
    steps: int
    flops: float
    hours: float | None  # None where no device was named


def find_machine(name: str | None, gpus: int, price: float | None) -> Machine | None:
    """The device of that name; None without one. Raises UserError for one that is not known."""
    if name is None:
        return None
    device = find_device(name)
    if device is None:
        known = nearest(name.lower(), [one.name for one in DEVICES])
        raise UserError(f"--device {name}: not known; {known}")
    return Machine(device=device, gpus=gpus, price_per_gpu_hour=price)


def cost_of(cell: Cell, machine: Machine | None) -> CellCost:
    """What one cell takes. Raises UserError where it does not fit on the machine."""
    recipe = cell.recipe
    tokens = recipe.total_steps * recipe.batch.global_batch_tokens
    hours = None
    if machine is not None:
        seconds = step_seconds_on(recipe, machine, cell.name)
        hours = recipe.total_steps * seconds / SECONDS_OF_AN_HOUR
    return CellCost(
        name=cell.name,
        parameters=sum(count_parameters(recipe.model).values()),
        tokens=tokens,
        steps=recipe.total_steps,
        flops=tokens * flops_per_token(recipe.model),
        hours=hours,
    )


def step_seconds_on(recipe: Recipe, machine: Machine, name: str) -> float:
    """Seconds of a step. Raises UserError where the cell does not divide over it, or fit."""
    device = machine.device
    try:
        config = merge_config(recipe, load_engine_config(recipe.engine), machine.gpus)
        check_it_fits(recipe, config, machine.gpus, device.memory_bytes, "cuda")
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    sizes = sizes_of(recipe, config, machine.gpus, "cuda")
    in_node, _ = parse_interconnect(f"{device.link},{NETWORK}")
    costs = assumed_costs(recipe, device, ASSUMED_MFU)
    return scale_to(sizes, costs, machine.gpus, in_node).step_s


def dry_run_page(matrix: Matrix, machine: Machine | None) -> str:
    """The matrix and its cost, as text. Raises UserError for cells that don't fit."""
    costs = [cost_of(cell, machine) for cell in matrix.cells]
    rows = [row_of(cost) for cost in costs]
    header: tuple[str, ...] = ("cell", "parameters", "tokens", "steps", "FLOPs")
    if machine is not None:
        header = (*header, "hours")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        name, *figures = row
        padded = [text.rjust(width) for text, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    baseline = None
    if matrix.treatment is not None:
        baseline = f"{matrix.treatment}={show_value(matrix.baseline)}"
    return render(
        "matrix.txt.jinja",
        recipe=matrix.recipe_name,
        cells=len(costs),
        groups=len(matrix.groups()),
        baseline=baseline,
        lines=lines,
        total=total_words(costs, machine),
        device=machine.device.name if machine else None,
        gpus=machine.gpus if machine else 0,
        mfu=f"{ASSUMED_MFU:.0%}",
    )


def row_of(cost: CellCost) -> tuple[str, ...]:
    """A line of the table."""
    row = [cost.name, f"{cost.parameters:,}", f"{cost.tokens:,}", f"{cost.steps:,}"]
    row.append(large(cost.flops))
    if cost.hours is not None:
        row.append(f"{cost.hours:.3g}")
    return tuple(row)


def total_words(costs: Sequence[CellCost], machine: Machine | None) -> str:
    """All cells together."""
    tokens = sum(cost.tokens for cost in costs)
    words = f"{tokens:,} tokens, {large(sum(cost.flops for cost in costs))} FLOPs"
    hours = [cost.hours for cost in costs if cost.hours is not None]
    if machine is None or not hours:
        return words
    total = sum(hours)
    words += f", {total:.3g} hours, {total * machine.gpus:.3g} GPU hours"
    if machine.price_per_gpu_hour is not None:
        price = total * machine.gpus * machine.price_per_gpu_hour
        words += f", price {price:,.2f}"
    return words
