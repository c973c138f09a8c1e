"""The jobs of `training_peers.py`: peers that are libraries, each training by its own loop.

    python tests/benchmarks/training_peer_jobs.py JOB HOME OUTPUT

HOME holds `recipe.yaml` and the ids of `train.bin`. Each job prints a line for every step, as its
peer does.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe

NEVER = 10**6


def accumulation_steps(recipe: Recipe) -> int:
    """Micro-batches of a step on one rank."""
    return recipe.global_batch_size // recipe.batch.micro_batch_size


def windows(home: Path, length: int) -> Tensor:
    """The ids as int64 rows, shape (windows, length)."""
    ids = np.fromfile(home / "train.bin", "<u2").astype("int64")
    return torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length))


def trainer_job(recipe: Recipe, home: Path, output_dir: Path) -> None:
    """Hugging Face's Trainer over DeepSpeed ZeRO-2."""
    import deepspeed
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments

    from pretrain.config.deepspeed import load_engine_config, merge_config

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model, optimizer, batch = recipe.model, recipe.optimizer, recipe.batch
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=True,
        deepspeed=merge_config(recipe, load_engine_config(recipe.engine), 1),
        per_device_train_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps(recipe),
        max_steps=recipe.total_steps,
        learning_rate=optimizer.peak_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.gradient_clipping,
        warmup_steps=recipe.schedule.warmup(recipe.total_steps),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.schedule.final_fraction},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    shape = GPTNeoXConfig(
        vocab_size=model.vocab_size, hidden_size=model.d_model, intermediate_size=4 * model.d_model,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads, rotary_pct=1.0,
        max_position_embeddings=model.seq_len, use_parallel_residual=False, use_cache=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in windows(home, model.seq_len)]
    Trainer(model=GPTNeoXForCausalLM(shape), args=arguments, train_dataset=rows).train()


def litgpt_job(recipe: Recipe, home: Path, output_dir: Path) -> None:
    """litgpt's pretraining loop."""
    from litgpt import Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.pretrain import setup
    from torch.utils.data import DataLoader

    model, optimizer, size = recipe.model, recipe.optimizer, recipe.batch.micro_batch_size
    rows = windows(home, model.seq_len + 1)

    class Windows(DataModule):
        def connect(self, *_: Any, **__: Any) -> None:
            """Nothing depends on what it tells."""

        def train_dataloader(self) -> Any:
            return DataLoader(rows, batch_size=size, shuffle=True)

        val_dataloader = train_dataloader

    shape = Config.from_name(
        "pythia-14m", block_size=model.seq_len, n_layer=model.num_layers, n_head=model.num_heads,
        n_embd=model.d_model, intermediate_size=4 * model.d_model, vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size, parallel_residual=False, rotary_percentage=1.0,
    )  # fmt: skip
    settings = {
        "lr": optimizer.peak_learning_rate, "betas": (optimizer.beta1, optimizer.beta2),
        "weight_decay": optimizer.weight_decay,
    }  # fmt: skip
    sys.argv = ["pretrain", shape.name]  # it reads its own command line once more when it saves
    setup(
        shape.name,
        shape,
        output_dir,
        "32-true",
        data=Windows(),
        devices=1,
        logger_name="csv",
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=recipe.global_batch_size,
            micro_batch_size=size,
            max_tokens=recipe.train_tokens,
            max_norm=optimizer.gradient_clipping,
            min_lr=optimizer.peak_learning_rate * recipe.schedule.final_fraction,
            lr_warmup_steps=recipe.schedule.warmup(recipe.total_steps) * accumulation_steps(recipe),
        ),
        eval=EvalArgs(interval=NEVER, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": settings},
    )


JOBS = {"trainer": trainer_job, "litgpt": litgpt_job}

if __name__ == "__main__":
    job, home, output = sys.argv[1:]
    JOBS[job](load_recipe(f"{home}/recipe.yaml", []), Path(home), Path(output))
