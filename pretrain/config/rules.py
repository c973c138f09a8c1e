"""Rules that tie several keys of a recipe together."""

from data_prep.errors import UserError
from pretrain.config.recipe import MAX_CODE_BITS, CheckpointsRecipe, ModelRecipe, Recipe


def check_recipe(recipe: Recipe, origin: str) -> None:
    """Rules that tie several keys together."""
    model = recipe.model
    if model.d_model % (2 * model.num_heads) != 0:
        head_width = model.d_model / model.num_heads
        raise UserError(
            f"{origin}: model.d_model {model.d_model} over model.num_heads {model.num_heads} is "
            f"{head_width:g}; rotary heads need a whole, even width"
        )
    if model.input_embedding != "learned":
        check_code_bits(model, origin)
    check_schedule(recipe, origin)
    check_exports(recipe.checkpoints, origin)
    if recipe.batch.global_batch_tokens % model.seq_len:
        below = recipe.global_batch_size * model.seq_len
        above = below + model.seq_len
        near = f"{below} and {above}" if below else f"{above}"
        raise UserError(
            f"{origin}: batch.global_batch_tokens {recipe.batch.global_batch_tokens} is not a "
            f"whole number of windows of model.seq_len {model.seq_len}; the nearest are {near}"
        )


def check_schedule(recipe: Recipe, origin: str) -> None:
    """Warm-up and decay must fit into the run."""
    schedule = recipe.schedule
    total = recipe.total_steps
    if schedule.kind != "wsd" and schedule.decay_steps is not None:
        raise UserError(
            f"{origin}: schedule.decay_steps belongs to schedule.kind wsd, not {schedule.kind}"
        )
    warmup = schedule.warmup(total)
    decay = schedule.decay(total) if schedule.kind == "wsd" else 0
    if warmup + decay > total:
        parts = f"{warmup:,} steps of warm-up"
        if decay:
            parts += f" and {decay:,} of decay"
        raise UserError(
            f"{origin}: schedule: {parts} are longer than the run of {total:,} steps; make them "
            "shorter or train_tokens larger"
        )


def check_exports(checkpoints: CheckpointsRecipe, origin: str) -> None:
    """An export is made of a checkpoint, so there must be one."""
    interval = checkpoints.export_every_steps
    if interval is None or interval % checkpoints.every_steps == 0:
        return
    below = interval - interval % checkpoints.every_steps
    above = below + checkpoints.every_steps
    near = f"{below} and {above}" if below else f"{above}"
    raise UserError(
        f"{origin}: checkpoints.export_every_steps {interval} is no multiple of "
        f"checkpoints.every_steps {checkpoints.every_steps}, and an export is made of a "
        f"checkpoint; the nearest are {near}"
    )


def check_code_bits(model: ModelRecipe, origin: str) -> None:
    """The code must tell all ids apart and tile the model width."""
    needed = (model.vocab_size - 1).bit_length()  # ceil(log2 V)
    bits = model.code_bits or needed
    if bits < needed:
        raise UserError(
            f"{origin}: model.code_bits {bits} cannot tell {model.vocab_size:,} ids apart; set it "
            f"to {needed} or more"
        )
    if model.d_model % bits:
        larger = range(bits, MAX_CODE_BITS + 1)
        fitting = [size for size in larger if model.d_model % size == 0]
        advice = "change model.d_model"
        if fitting:
            advice = f"set model.code_bits to {fitting[0]}, the next that does"
        raise UserError(
            f"{origin}: model.code_bits {bits} does not divide model.d_model {model.d_model}; "
            f"{advice}"
        )
