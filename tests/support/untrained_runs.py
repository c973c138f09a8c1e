"""Runs that were never trained, for tests of what is made of a run."""

from pathlib import Path

import torch

from data_prep.files import write_durably
from pretrain.checkpoint.manifest import AboutData
from pretrain.checkpoint.reader import Fragment
from pretrain.checkpoint.saving import Savers, save_checkpoint
from pretrain.config.load import build_recipe, recipe_to_dict
from pretrain.distributed.world import World
from pretrain.model.build import model_config
from pretrain.modeling_tablefree import (
    TableFreeForCausalLM,
    checkpoint_parameters,
    initialise_parameters,
)
from support.hand_made_runs import manifest_of
from support.runs import tiny_recipe_content


def save_untrained_run(
    run_dir: Path, tokenizer: Path, input_embedding: str, noise: float = 0.1, **model: int
) -> None:
    """A run's directory with one checkpoint of random weights, LayerNorms and biases included."""
    seq_len = model.get("seq_len", 32)
    content = tiny_recipe_content(
        model={"input_embedding": input_embedding, **model},
        batch={"global_batch_tokens": 6 * seq_len},
        validation={"eval_tokens": 8 * seq_len},
        train_tokens=20 * 6 * seq_len,
    )
    recipe = build_recipe(content, "test")
    untrained = TableFreeForCausalLM(model_config(recipe.model))
    initialise_parameters(untrained, 7)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in untrained.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    parameters = {name: p.detach() for name, p in checkpoint_parameters(untrained)}
    fragments = [
        Fragment(
            name=n,
            start=0,
            states={k: p.flatten().clone() for k in ("master", "exp_avg", "exp_avg_sq")},
        )
        for n, p in parameters.items()
    ]
    source = {"name": "s", "origin": "o", "weight": 1.0, "license": None}
    manifest = manifest_of(
        1,
        {name: list(p.shape) for name, p in parameters.items()},
        data=AboutData(eos_id=0, sources=[source]),
        recipe=recipe_to_dict(recipe),
        model_config=model_config(recipe.model).to_diff_dict(),
    )
    alone = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    save_checkpoint(run_dir, fragments, manifest, Savers(world=alone))
    for file in tokenizer.iterdir():
        write_durably(run_dir / "tokenizer" / file.name, file.read_bytes())
