"""The directory that a build writes: is it this build's, what it says of itself, what goes from it."""

import json
from pathlib import Path
from typing import Any

from data_prep import layout
from data_prep.building.build_plan import Plan
from data_prep.building.unit_records import writing
from data_prep.errors import UserError, explained, parse_json
from data_prep.files import write_durably
from data_prep.layout import SHARDS_NAME, UNITS_NAME
from data_prep.locks import HOLDER_NAME, LOCK_NAME, Lock, lock
from data_prep.manifest import (
    MANIFEST_NAME,
    REBUILD,
    load_manifest,
)
from data_prep.shards import CHAT_TEMPLATE_NAME, TOKENIZER_FILES, TOKENIZER_NAME, ShardReader
from data_prep.tokenizer.load import LoadedTokenizer

BUILD_NAME = "build.json"


def is_complete(output_dir: Path, plan: Plan) -> bool:
    """Whether this very data set is there already. Raises UserError if something else is."""
    elsewhere = "choose another --output-dir, or remove that one"
    begun = {
        LOCK_NAME,
        HOLDER_NAME,
        f"{BUILD_NAME}.tmp",
    }  # all that a build leaves if it is killed as it begins
    if not output_dir.exists() or (
        output_dir.is_dir() and {path.name for path in output_dir.iterdir()} <= begun
    ):
        return False
    other = f"{output_dir}: exists, and is not a data set of this command"
    with explained((OSError, ValueError, KeyError, TypeError), other, elsewhere):
        built = parse_json((output_dir / BUILD_NAME).read_bytes(), other, elsewhere)
        if built["state"] not in ("incomplete", "complete"):
            raise ValueError(f"{BUILD_NAME} is of something else")
        signature, origins = built["signature"], list(built.get("origins", []))
    is_of_tokenizer = built.get("tokenizer_sha256") == plan.identity["tokenizer_sha256"]
    is_akin = is_of_tokenizer and any(origin in origins for origin in plan.identity["origins"])
    if not (output_dir / MANIFEST_NAME).exists():
        if not is_akin and any((output_dir / UNITS_NAME).glob("*/*.json")):
            raise UserError(
                f"{output_dir}: holds finished units of another mixture or tokenizer; {elsewhere}"
            )
        return False
    if signature != plan.identity["signature"]:
        other = (
            "holds a data set of another mixture or tokenizer, or of inputs of another size or "
            "time of change"
        )
        anew = f"; to build it anew here, in place of what is there, {REBUILD}"
        fingerprint = load_manifest(output_dir).fingerprint
        anew += (
            f": where the text is another one now, that loses {fingerprint}, and runs on it can't "
            "be resumed"
        )
        raise UserError(f"{output_dir}: {other}; {elsewhere}{anew * is_akin}")
    ShardReader(output_dir).check_files()
    return True


def prepare_directory(output_dir: Path, plan: Plan, tokenizer: LoadedTokenizer) -> Lock:
    """The output directory says what is being built in it, and is held. Finished units of an
    earlier build stay.
    """
    refuse_shared_folders(output_dir)
    with writing(output_dir, "the tokenizer"):
        held = lock(output_dir, "building or repairing it", "--output-dir")
        write_json(output_dir / BUILD_NAME, {"state": "incomplete", **plan.identity})
        write_tokenizer(output_dir, tokenizer)
    return held


def refuse_shared_folders(data_dir: Path) -> None:
    """A folder of the data set that is a link may lead to a larger disk, but not into another data
    set: what is written or removed here would be that one's.
    """
    for name in (SHARDS_NAME, UNITS_NAME, TOKENIZER_NAME):
        folder = data_dir / name
        home = folder.resolve().parent
        if folder.is_symlink() and home != data_dir.resolve() and (home / BUILD_NAME).exists():
            raise UserError(
                f"{folder}: is a link into another data set, {home}; remove it, or copy what it "
                "leads to"
            )


def write_tokenizer(output_dir: Path, tokenizer: LoadedTokenizer) -> None:
    """The copy of the tokenizer beside the shards. A link there goes, its target stays, and so
    do files not ours.
    """
    directory = output_dir / TOKENIZER_NAME
    if directory.is_symlink():
        directory.unlink()
    for name in {*TOKENIZER_FILES, CHAT_TEMPLATE_NAME} - tokenizer.files.keys():
        (directory / name).unlink(missing_ok=True)
    for name, content in tokenizer.files.items():
        write_durably(directory / name, content)


def remove_strays(output_dir: Path, known: set[str]) -> None:
    """Remove what earlier builds left of units that are no longer part of the data set.

    Nothing that builds don't write is removed, and nothing behind a link; `verify` names what else
    is there.
    """
    for name in (SHARDS_NAME, UNITS_NAME):
        folder = output_dir / name
        for path in [] if folder.is_symlink() else sorted(folder.rglob("*")):
            place = path.relative_to(output_dir).as_posix()
            if path.is_file() and place not in known and layout.is_written_by_builds(place):
                path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A small JSON file, durably."""
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())
