"""What recipe keys are called elsewhere, for whoever comes from there."""

from collections.abc import Sequence

from data_prep.errors import nearest

# Last names as nanoGPT, litgpt, GPT-NeoX, Megatron-LM, torchtitan, OLMo and the Hugging Face
# Trainer have them.
ELSEWHERE = {
    "model.vocab_size": ("n_vocab", "padded_vocab_size", "vocab"),
    "model.d_model": (
        "n_embd",
        "hidden_size",
        "hidden_dim",
        "n_embed",
        "embed_dim",
        "dim",
        "width",
        "emb_dim",
    ),
    "model.num_layers": (
        "n_layer",
        "n_layers",
        "num_hidden_layers",
        "num_layer",
        "depth",
        "layers",
    ),
    "model.num_heads": ("n_head", "n_heads", "num_attention_heads", "heads", "num_head"),
    "model.seq_len": (
        "block_size",
        "seq_length",
        "sequence_length",
        "max_seq_len",
        "max_seq_length",
        "context_length",
        "n_ctx",
        "max_position_embeddings",
        "context",
        "max_length",
    ),
    "model.input_embedding": ("embedding", "input_code"),
    "batch.global_batch_tokens": (
        "batch_size",
        "global_batch_size",
        "total_batch_size",
        "train_batch_size",
        "gradient_accumulation_steps",
        "grad_accum",
        "accumulate_grad_batches",
        "batch_tokens",
        "tokens_per_batch",
    ),
    "batch.micro_batch_size": (
        "per_device_train_batch_size",
        "micro_batch",
        "device_batch_size",
        "local_batch_size",
        "train_micro_batch_size_per_gpu",
        "per_gpu_batch_size",
        "mbs",
    ),
    "optimizer.peak_learning_rate": (
        "lr",
        "learning_rate",
        "max_lr",
        "peak_lr",
        "base_lr",
        "learning_rate_init",
    ),
    "optimizer.beta1": ("adam_beta1", "betas", "b1"),
    "optimizer.beta2": ("adam_beta2", "b2"),
    "optimizer.eps": ("epsilon", "adam_epsilon", "adam_eps"),
    "optimizer.weight_decay": ("wd", "decay"),
    "optimizer.gradient_clipping": (
        "grad_clip",
        "max_grad_norm",
        "clip_grad",
        "clip_grad_norm",
        "gradient_clip_val",
        "max_norm",
        "clipping",
    ),
    "schedule.kind": (
        "lr_scheduler_type",
        "scheduler",
        "lr_schedule",
        "lr_decay_style",
        "decay_type",
    ),
    "schedule.warmup_steps": (
        "warmup_iters",
        "warmup",
        "lr_warmup_iters",
        "num_warmup_steps",
        "warmup_iterations",
    ),
    "schedule.warmup_fraction": ("warmup_ratio", "lr_warmup_fraction"),
    "schedule.decay_steps": (
        "lr_decay_iters",
        "num_decay_steps",
        "cooldown_steps",
        "cooldown_iters",
    ),
    "schedule.final_fraction": (
        "min_lr",
        "min_lr_ratio",
        "final_lr_frac",
        "min_learning_rate",
        "lr_min",
        "alpha_f",
    ),
    "activation_checkpointing.mode": (
        "gradient_checkpointing",
        "activation_checkpoint",
        "recompute",
        "checkpoint_activations",
        "recompute_granularity",
    ),
    "validation.every_steps": (
        "eval_interval",
        "eval_steps",
        "eval_every",
        "val_check_interval",
        "eval_freq",
    ),
    "validation.eval_tokens": ("eval_iters", "eval_batches", "val_tokens", "val_batches"),
    "checkpoints.every_steps": (
        "save_interval",
        "save_steps",
        "save_every",
        "checkpoint_interval",
        "save_freq",
    ),
    "checkpoints.keep_last": (
        "save_total_limit",
        "keep_latest_k",
        "keep_checkpoints",
        "keep_last_n",
    ),
    "train_tokens": (
        "max_iters",
        "max_steps",
        "train_steps",
        "train_iters",
        "num_train_epochs",
        "epochs",
        "num_epochs",
        "max_tokens",
        "num_iterations",
        "total_steps",
        "total_tokens",
        "steps",
        "training_steps",
        "n_tokens",
    ),
    "seed": ("random_seed", "manual_seed", "data_seed"),
    "intra_document_masking": (
        "document_masking",
        "doc_mask",
        "reset_attention_mask",
        "reset_position_ids",
    ),
    "compile": ("torch_compile", "compile_model"),
    "deterministic": ("deterministic_mode", "full_determinism"),
    "engine": (
        "deepspeed",
        "deepspeed_config",
        "precision",
        "dtype",
        "bf16",
        "fp16",
        "fp32",
        "zero_stage",
        "strategy",
    ),
}
OURS = {name: key for key, names in ELSEWHERE.items() for name in names}


def suggest_key(dotted: str, keys: Sequence[str]) -> str:
    """A suggestion for an unknown recipe key.

    It is one of the same last name, what that name means elsewhere, or the closest one.
    """
    last = dotted.rpartition(".")[2]
    same_name = [key for key in keys if key.rpartition(".")[2] == last]
    elsewhere = OURS.get(last.lower().replace("-", "_"))
    if not same_name and elsewhere:
        return f"did you mean {elsewhere}?"
    if "." not in dotted:
        # It may be a section: `mode` is nearer to model than to any key of that name.
        return nearest(dotted, keys)
    return nearest(dotted, same_name or keys)
