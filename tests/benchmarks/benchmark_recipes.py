"""Recipes as benchmarks take them: those that leave their vocabulary to a data set get the
paper's.
"""

import os
from collections.abc import Sequence

from data_prep.errors import parse_yaml
from pretrain.config.deepspeed import load_engine_config, merge_config
from pretrain.config.load import AUTO, RECIPES_DIR, load_recipe, shipped_file
from pretrain.config.recipe import Recipe
from pretrain.costs.fit import check_it_fits

VOCABULARY = f"--model.vocab_size={65_536}"


def with_vocabulary(name: str, overrides: Sequence[str]) -> list[str]:
    """The overrides, before them a vocabulary if the recipe has none. Raises UserError if there
    is no such recipe.
    """
    path = shipped_file(name, RECIPES_DIR, ".yaml", "--recipe")
    content = parse_yaml(path.read_bytes(), str(path))
    model = content.get("model") if isinstance(content, dict) else None
    has_none = isinstance(model, dict) and model.get("vocab_size") == AUTO
    return [VOCABULARY, *overrides] if has_none else [*overrides]


def load_for_benchmark(name: str, overrides: Sequence[str]) -> Recipe:
    """A shipped recipe by name or a file by path. Raises UserError, also where its training needs
    more memory than the machine has.
    """
    recipe = load_recipe(name, with_vocabulary(name, overrides))
    in_fp32 = merge_config(recipe, load_engine_config("zero2_fp32"), 1)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    check_it_fits(recipe, in_fp32, 1, physical, "cpu")
    return recipe
