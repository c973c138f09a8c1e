"""Begins a run with the weights of a directory: a checkpoint at step 0, whole or absent."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.errors import UserError, parse_json
from data_prep.files import replace_directory, write_durably
from data_prep.shards import CHAT_TEMPLATE_NAME, TOKENIZER_FILES, TOKENIZER_NAME
from pretrain.checkpoint.manifest import AboutData, CheckpointManifest
from pretrain.checkpoint.saving import Savers, save_checkpoint
from pretrain.config.load import recipe_to_dict, recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.data.tokenizer import CONFIG_NAME, as_in_the_data
from pretrain.data.tokenizer_definition import DEFINITION_NAME
from pretrain.distributed.world import World
from pretrain.hf.marker import read_marker
from pretrain.hf.names import CONFIG_FILE, GENERATION_FILE
from pretrain.hf.tokenizer import content_of, ids_of_roles
from pretrain.importing.decoder import Decoder, open_decoder
from pretrain.importing.foreign import read_foreign
from pretrain.importing.recipes import hints_of, recipe_asked, recipe_of
from pretrain.run.directory import RECIPE_NAME
from pretrain.run.state import write_state

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a run begins with."""

    decoder: Decoder
    recipe: Recipe
    tokenizer: dict[str, bytes]  # its files, by name
    eos_id: int

    @property
    def origin(self) -> str:
        """What the run says of where its weights are from."""
        foreign = self.decoder.foreign
        return f"{foreign.directory.resolve()} ({foreign.form})"


def open_import(directory: Path, recipe: str | None, names_file: Path | None) -> Imported:
    """Read and check all that a run begins with, but for the values of its weights.

    Raises UserError for what can't be imported.
    """
    foreign = read_foreign(directory)
    asked = recipe_asked(recipe, foreign.vocab_size) if recipe else None
    marker = read_marker(directory)
    decoder = open_decoder(directory, names_file, hints_of(foreign, asked, marker))
    tokenizer = tokenizer_files(directory)
    reference = as_in_the_data(tokenizer[DEFINITION_NAME], directory / DEFINITION_NAME)
    if reference.get_vocab_size() > foreign.vocab_size:
        raise UserError(
            f"{directory / DEFINITION_NAME}: has {reference.get_vocab_size():,} ids, and "
            f"{CONFIG_FILE} a vocab_size of {foreign.vocab_size:,}: another model's tokenizer"
        )
    return Imported(
        decoder=decoder,
        recipe=recipe_of(decoder, asked, marker),
        tokenizer=tokenizer,
        eos_id=end_of_document(directory, decoder, reference),
    )


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer that comes with the weights. Raises UserError where there is none."""
    paths = [directory / name for name in (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME)]
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    for name in (DEFINITION_NAME, CONFIG_NAME):
        if name not in files:
            raise UserError(
                f"{directory / name}: missing; copy the tokenizer of the weights there, so that a "
                "data set's can be compared with it"
            )
    return files


def end_of_document(directory: Path, decoder: Decoder, reference: Tokenizer) -> int:
    """The id that ends documents: of a config, or of the tokenizer's; of published models pad_id.

    Raises UserError where nothing names one.
    """
    config = decoder.foreign.config
    told = [config.get("eos_token_id")]
    for name in (GENERATION_FILE, CONFIG_NAME):
        path = directory / name
        if path.is_file():
            content = parse_json(path.read_bytes(), str(path), "get the file again")
            content = content if isinstance(content, dict) else {}
            role = {"eos_token": content_of(content.get("eos_token"))}
            told += [content.get("eos_token_id"), ids_of_roles(role, reference).get("eos_token")]
    told.append(config.get("pad_id"))
    for value in told:
        if isinstance(value, int) and 0 <= value < decoder.foreign.vocab_size:
            return value
    raise UserError(
        f"{decoder.foreign.where}: no eos_token_id, here or in {GENERATION_FILE}: write there "
        "which id ends documents"
    )


def refuse_what_is_there(run_dir: Path) -> None:
    """Raise UserError for a --run-dir that holds something already."""
    if os.path.lexists(run_dir) and not (run_dir.is_dir() and not os.listdir(run_dir)):
        raise UserError(f"--run-dir {run_dir}: is there already; give a new directory")


def begin_run(imported: Imported, run_dir: Path) -> None:
    """Write the run's directory beside its place, and rename it: it is there whole, or not at all.

    Raises UserError for weights that hold what is no number, or for a full disk.
    """
    replace_directory(run_dir, lambda staged: write_run(imported, staged))


def write_run(imported: Imported, run_dir: Path) -> None:
    """Fill an empty directory."""
    decoder = imported.decoder
    recipe = imported.recipe
    write_durably(run_dir / RECIPE_NAME, recipe_to_yaml(recipe).encode())
    for name, content in imported.tokenizer.items():
        write_durably(run_dir / TOKENIZER_NAME / name, content)
    model_config: dict[str, Any] = decoder.config.to_diff_dict()
    manifest = CheckpointManifest(
        step=0,
        optimizer_step=0,
        seed=recipe.seed,
        fingerprint="",
        data_dir="",
        data=AboutData(eos_id=imported.eos_id, sources=[]),
        recipe=recipe_to_dict(recipe),
        deepspeed={},
        model_config=model_config,
        parameters=decoder.shapes,
        imported_from=imported.origin,
    )
    save_checkpoint(run_dir, decoder.fragments(), manifest, Savers(world=ALONE))
    write_state(run_dir, saved_step=0, imported_from=imported.origin)
