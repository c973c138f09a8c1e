"""What an export says of itself, so that the next one replaces exports of ours and nothing else.

`tablefree_export.json` names the run that was exported (its data sets' fingerprints and what its
steps depend on in the recipe), the step, the form, and the digest of every other file. transformers
does not look at it.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import digest_file
from data_prep.layout import UNITS_NAME
from data_prep.manifest import MANIFEST_NAME
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.changes import MAY_CHANGE_ON_BRANCH, flatten
from pretrain.config.load import build_recipe, recipe_to_dict

MARKER_NAME = "tablefree_export.json"
FORMAT = "tablefree-export"


@dataclass(frozen=True, kw_only=True)
class Marker:
    """The content of an export's marker."""

    fingerprint: str  # of the data set; of several, of the newest
    # Dotted keys, but for those that may differ between parts or lengths of a run.
    recipe: dict[str, Any]
    step: int
    architecture: str
    dtype: str
    files: dict[str, str]  # name -> xxh3-128
    format: str = FORMAT
    # Of a run that had several data sets: the fingerprint of each, and the first step on it.
    data_stages: list[dict[str, str | int]] | None = None

    @property
    def identity(self) -> tuple[str, int, str, str]:
        """What was exported, and how."""
        return (self.fingerprint, self.step, self.architecture, self.dtype)

    def to_bytes(self) -> bytes:
        """The marker's file, byte for byte reproducible."""
        content = asdict(self)
        if self.data_stages is None:
            del content["data_stages"]
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def stages_marked(manifest: CheckpointManifest) -> list[dict[str, str | int]] | None:
    """The data sets of a run that had several, as its export names them; None of one."""
    if not manifest.stages:
        return None
    return [
        {"fingerprint": stage.fingerprint, "first_step": stage.first_step}
        for stage in manifest.stages
    ]


def run_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The keys of a run's recipe that make it this run and no other.

    Keys that it lacks are as default.
    """
    recipe = build_recipe(checkpoint.manifest.recipe, str(checkpoint.path))
    kept = {}
    for key, value in flatten(recipe_to_dict(recipe)).items():
        section = key.partition(".")[0]
        if MAY_CHANGE_ON_BRANCH.isdisjoint((key, section)):
            kept[key] = value
    return kept


def write_marker(
    directory: Path, checkpoint: Checkpoint, architecture: str, dtype: str, digests: dict[str, str]
) -> None:
    """Mark the files in a directory, all of which have their digest here, as an export of this
    checkpoint.
    """
    marker = Marker(
        fingerprint=checkpoint.manifest.fingerprint,
        recipe=run_recipe(checkpoint),
        step=checkpoint.step,
        architecture=architecture,
        dtype=dtype,
        files=digests,
        data_stages=stages_marked(checkpoint.manifest),
    )
    (directory / MARKER_NAME).write_bytes(marker.to_bytes())


def read_marker(directory: Path) -> Marker | None:
    """The marker of an export; None where there is none as `write_marker` writes it."""
    path = directory / MARKER_NAME
    if not path.is_file():
        return None
    raw = path.read_bytes()
    try:
        marker = Marker(**json.loads(raw))
    except (ValueError, TypeError, RecursionError):
        return None
    if marker.format != FORMAT:
        return None
    if not isinstance(marker.files, dict) or not isinstance(marker.recipe, dict):
        return None
    # What was edited by hand may be wrong about the files, and so allows nothing to be replaced.
    is_as_written = marker.to_bytes() == raw
    return marker if is_as_written else None


def refuse_to_replace(output: Path, checkpoint: Checkpoint, *, overwrite: bool) -> None:
    """Raise UserError where an export into a directory would lose something.

    What is replaced holds nothing but an export's files. Where they were edited, or are of another
    run, that takes `overwrite`; what no export made is never removed.
    """
    place = f"--output-dir {output}"
    refuse_a_home_of_others(output, place, checkpoint)
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise UserError(f"{place}: is no directory; give another")
    if not os.listdir(output):
        return
    marker = read_marker(output)
    if marker is None:
        raise UserError(
            f"{place}: holds something else than an export with its {MARKER_NAME} (early ones "
            "have none); remove it, or give another directory"
        )
    refuse_more_than_an_export(output, place, marker)
    why = None if overwrite else why_precious(output, marker, checkpoint)
    if why is not None:
        raise UserError(f"{place}: {why}; --overwrite replaces it, or give another directory")


def refuse_a_home_of_others(output: Path, place: str, checkpoint: Checkpoint) -> None:
    """Raise UserError for a place in a run's checkpoints or in a data set."""
    home = output.resolve()  # a link may lead there
    if home.is_relative_to(checkpoint.path.resolve().parent):
        raise UserError(f"{place}: is among the run's checkpoints; give another directory")
    for folder in (home, *home.parents):
        if (folder / MANIFEST_NAME).is_file() and (folder / UNITS_NAME).is_dir():
            raise UserError(
                f"{place}: is in the data set {folder}, which holds nothing else; give another "
                "directory"
            )


def refuse_more_than_an_export(output: Path, place: str, marker: Marker) -> None:
    """Raise UserError for a directory that holds anything but the files of its export."""
    for name in strangers_in(output, marker):
        raise UserError(
            f"{place}: {name} is no part of the export there; move it away, or give another "
            "directory"
        )


def strangers_in(output: Path, marker: Marker) -> list[str]:
    """What the directory of an export holds that is none of its files, nor its marker."""
    own = {*marker.files, MARKER_NAME}
    paths = [output / name for name in sorted(os.listdir(output))]
    return [
        path.name
        for path in paths
        if path.name not in own or not path.is_file() or path.is_symlink()
    ]


def why_precious(output: Path, marker: Marker, checkpoint: Checkpoint) -> str | None:
    """What would be lost with the export there if this checkpoint's took its place.

    None where it can be made again.
    """
    for name, digest in marker.files.items():
        if not (output / name).is_file():
            return f"{name} of the export there is missing"
        if digest_file(output / name) != digest:
            return f"{name} was changed since it was exported"
    manifest = checkpoint.manifest
    here = {
        "fingerprint": manifest.fingerprint,
        "data_stages": stages_marked(manifest),
        **run_recipe(checkpoint),
    }
    there = {
        "fingerprint": marker.fingerprint,
        "data_stages": marker.data_stages,
        **marker.recipe,
    }
    # Keys that only one of the two has are of another version of this project: they tell nothing.
    for key, value in there.items():
        if key in here and here[key] != value:
            return f"holds an export of another run ({key} {value}, here {here[key]})"
    return None
