"""Proof that cells of one seed are matched: the same samples, and the same weights at the start.

Sample n of a run is a function of the data set's fingerprint, the seed and n alone
(pretrain/data/loader.py): so cells that agree in these, in the window and in the number of samples
saw the same ones in the same order. Initial weights are made anew from the recipe and digested;
those that all cells of a seed have, by name and shape, must be equal bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import xxhash

from pretrain.comparing.cells import Place
from pretrain.comparing.matrix import Cell, Matrix, Settings
from pretrain.config.recipe import ModelRecipe, Recipe
from pretrain.run.directory import ENGINE_CONFIG_NAME

Digests = dict[str, str]  # of parameters, by name and shape
Made = dict[tuple[ModelRecipe, int], Digests]  # by model and seed, which alone decide them


@dataclass(frozen=True, kw_only=True)
class Match:
    """Cells of one seed in one group."""

    group: Settings
    seed: int
    cells: tuple[str, ...]
    samples: int | None  # that each saw; None where they saw others
    global_batch_tokens: int | None  # of each; None where they differ
    shared_parameters: int  # how many parameter tensors all of them have
    weights: str | None  # digest of these at the start; None where they differ
    is_same_engine: bool  # precision and ranks too, as DeepSpeed was told

    @property
    def is_matched(self) -> bool:
        """Whether nothing but the treatment tells them apart."""
        differs = None in (self.samples, self.global_batch_tokens, self.weights)
        return self.is_same_engine and not differs


def initial_digests(recipe: Recipe) -> Digests:
    """The initial weights of a run, a digest for each parameter."""
    from pretrain.model.build import build_model
    from pretrain.modeling_tablefree import checkpoint_parameters

    # Compilation gives parameters other names, and no other values.
    model = build_model(replace(recipe, compile=False))
    digests = {}
    for name, parameter in checkpoint_parameters(model):
        content = parameter.detach().contiguous().numpy().tobytes()
        digests[f"{name} {list(parameter.shape)}"] = xxhash.xxh3_128_hexdigest(content)
    return digests


def match_cells(matrix: Matrix, names: Sequence[str], place: Place) -> list[Match]:
    """Of each group and seed, what its cells of these names have in common."""
    made: Made = {}
    matches = []
    for group in matrix.groups():
        there = [cell for cell in group if cell.name in names]
        for seed in dict.fromkeys(cell.seed for cell in there):
            of_seed = [cell for cell in there if cell.seed == seed]
            match = match_seed(matrix.group_of(of_seed[0]), of_seed, made)
            engines = {engine_of(place, cell) for cell in of_seed}
            matches.append(replace(match, is_same_engine=len(engines) == 1))
    return matches


def match_seed(group: Settings, cells: Sequence[Cell], made: Made) -> Match:
    """What cells of one seed have in common; `made` keeps digests for the next seed or group."""
    recipes = [cell.recipe for cell in cells]
    windows = {(recipe.model.seq_len, samples_of(recipe)) for recipe in recipes}
    batches = {recipe.batch.global_batch_tokens for recipe in recipes}
    digests = []
    for recipe in recipes:
        key = (recipe.model, recipe.seed)
        if key not in made:
            made[key] = initial_digests(recipe)
        digests.append(made[key])
    shared = sorted(set.intersection(*(set(of_cell) for of_cell in digests)))
    weights = {digest_of(of_cell, shared) for of_cell in digests}
    return Match(
        group=group,
        seed=cells[0].seed,
        cells=tuple(cell.name for cell in cells),
        samples=samples_of(recipes[0]) if len(windows) == 1 else None,
        global_batch_tokens=batches.pop() if len(batches) == 1 else None,
        shared_parameters=len(shared),
        weights=weights.pop() if len(weights) == 1 else None,
        is_same_engine=True,
    )


def engine_of(place: Place, cell: Cell) -> bytes:
    """What DeepSpeed was told in a cell's run."""
    return (place.run_dir(cell) / ENGINE_CONFIG_NAME).read_bytes()


def samples_of(recipe: Recipe) -> int:
    """How many windows a whole run takes."""
    return recipe.total_steps * recipe.global_batch_size


def digest_of(digests: Digests, names: Sequence[str]) -> str:
    """One digest of several parameters."""
    lines = [f"{name} {digests[name]}" for name in names]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())
