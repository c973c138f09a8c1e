"""Rules that tie several keys of a recipe together."""

from data_prep.errors import UserError
from pretrain.config.recipe import MAX_CODE_BITS, ModelRecipe, Recipe


def check_recipe(recipe: Recipe, origin: str) -> None:
    """Rules that tie several keys together."""
    model = recipe.model
    if model.d_model % model.num_heads or (model.d_model // model.num_heads) % 2:
        raise UserError(
            f"{origin}: model.d_model {model.d_model} over model.num_heads {model.num_heads} is "
            f"{model.d_model / model.num_heads:g}; rotary heads need a whole, even width"
        )
    if model.input_embedding != "learned":
        check_code_bits(model, origin)
    check_schedule(recipe, origin)
    if recipe.batch.global_batch_tokens % model.seq_len:
        below = recipe.global_batch_size * model.seq_len
        near = f"{below} and {below + model.seq_len}" if below else f"{model.seq_len}"
        raise UserError(
            f"{origin}: batch.global_batch_tokens {recipe.batch.global_batch_tokens} is not a "
            f"whole number of windows of model.seq_len {model.seq_len}; the nearest are {near}"
        )


def check_schedule(recipe: Recipe, origin: str) -> None:
    """Warm-up and decay must fit into the run."""
    schedule, total = recipe.schedule, recipe.total_steps
    if schedule.kind != "wsd" and schedule.decay_steps is not None:
        raise UserError(
            f"{origin}: schedule.decay_steps belongs to schedule.kind wsd, not {schedule.kind}"
        )
    warmup = schedule.warmup(total)
    decay = schedule.decay(total) if schedule.kind == "wsd" else 0
    if warmup + decay > total:
        raise UserError(
            f"{origin}: schedule: {warmup:,} steps of "
            f"warm-up{f' and {decay:,} of decay' if decay else ''} are longer than the run of "
            f"{total:,} steps; make them shorter or train_tokens larger"
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
        fitting = next((k for k in range(bits, MAX_CODE_BITS + 1) if model.d_model % k == 0), None)
        advice = (
            f"set model.code_bits to {fitting}, the next that does"
            if fitting
            else "change model.d_model"
        )
        raise UserError(
            f"{origin}: model.code_bits {bits} does not divide model.d_model {model.d_model}; "
            f"{advice}"
        )
