"""The directory that a build writes: what is there already, and what it says of itself.

`build.json` tells what is being built, or was, from what and by whom. It is no part of the data.
"""

import json
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import layout
from data_prep.building.build_plan import Identity, Plan
from data_prep.building.unit_records import writing
from data_prep.errors import UserError, explained, parse_json
from data_prep.files import write_durably
from data_prep.layout import SHARDS_NAME, UNITS_NAME
from data_prep.locks import HOLDER_NAME, LOCK_NAME, Lock, lock
from data_prep.manifest import MANIFEST_NAME, REBUILD, load_manifest
from data_prep.shards import CHAT_TEMPLATE_NAME, TOKENIZER_FILES, TOKENIZER_NAME, ShardReader
from data_prep.tokenizer.load import LoadedTokenizer

BUILD_NAME = "build.json"
# All that a build leaves if it is killed as it begins.
LEFT_BY_A_BEGINNING = {LOCK_NAME, HOLDER_NAME, f"{BUILD_NAME}.tmp"}
ELSEWHERE = "choose another --output-dir, or remove that one"


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `build.json` tells of whose units lie in a directory."""

    signature: str  # of inputs, tokenizer and mixture, see `Identity`
    tokenizer_sha256: str | None  # None where an early version built
    origins: list[Any]  # of sources, as `Identity` has them

    def is_akin_to(self, identity: Identity) -> bool:
        """Whether it is of the same tokenizer and of one of the same sources."""
        if self.tokenizer_sha256 != identity.tokenizer_sha256:
            return False
        return any(origin in self.origins for origin in identity.origins)


def is_complete(output_dir: Path, plan: Plan) -> bool:
    """Whether this very data set is there already. Raises UserError if something else is."""
    if is_new(output_dir):
        return False
    built = read_built(output_dir)
    is_akin = built.is_akin_to(plan.identity)
    if not (output_dir / MANIFEST_NAME).exists():
        has_units = any((output_dir / UNITS_NAME).glob("*/*.json"))
        if has_units and not is_akin:
            problem = "holds finished units of another mixture or tokenizer"
            raise UserError(f"{output_dir}: {problem}; {ELSEWHERE}")
        return False
    if built.signature != plan.identity.signature:
        raise _holds_another(output_dir, is_akin)
    ShardReader(output_dir).check_files()
    return True


def is_new(output_dir: Path) -> bool:
    """Whether there is nothing yet, or only what a build leaves that was killed as it began."""
    if not output_dir.exists():
        return True
    if not output_dir.is_dir():
        return False
    return {path.name for path in output_dir.iterdir()} <= LEFT_BY_A_BEGINNING


def read_built(output_dir: Path) -> Built:
    """What `build.json` tells. Raises UserError where it isn't there, or is none of ours."""
    other = f"{output_dir}: exists, and is not a data set of this command"
    with explained((OSError, ValueError, KeyError, TypeError), other, ELSEWHERE):
        told = parse_json((output_dir / BUILD_NAME).read_bytes(), other, ELSEWHERE)
        if told["state"] not in ("incomplete", "complete"):
            raise ValueError(f"{BUILD_NAME} is of something else")
        return Built(
            signature=told["signature"],
            tokenizer_sha256=told.get("tokenizer_sha256"),
            origins=list(told.get("origins", [])),
        )


def _holds_another(output_dir: Path, is_akin: bool) -> UserError:
    """A complete data set is there, of other inputs; where it is akin, it may be built anew."""
    problem = (
        "holds a data set of another mixture or tokenizer, or of inputs of another size or time "
        "of change"
    )
    # A damaged manifest is said to be one: it is read either way.
    fingerprint = load_manifest(output_dir).fingerprint
    advice = ELSEWHERE
    if is_akin:
        advice += f"; to build it anew here, in place of what is there, {REBUILD}"
        loss = f"that loses {fingerprint}, and runs on it can't be resumed"
        advice += f": where the text is another one now, {loss}"
    return UserError(f"{output_dir}: {problem}; {advice}")


def prepare_directory(output_dir: Path, plan: Plan, tokenizer: LoadedTokenizer) -> Lock:
    """The output directory says what is being built in it, and is held.

    Finished units of an earlier build stay. Raises UserError if another process is at work there.
    """
    refuse_shared_folders(output_dir)
    with writing(output_dir, "the tokenizer"):
        held = lock(output_dir, "building or repairing it", "--output-dir")
        about = {"state": "incomplete", **asdict(plan.identity)}
        write_json(output_dir / BUILD_NAME, about)
        write_tokenizer(output_dir, tokenizer)
    return held


def refuse_shared_folders(data_dir: Path) -> None:
    """Raise UserError for a folder that is a link into another data set.

    It may lead to a larger disk; but what is written or removed here would be that data set's.
    """
    for name in (SHARDS_NAME, UNITS_NAME, TOKENIZER_NAME):
        folder = data_dir / name
        home = folder.resolve().parent
        is_elsewhere = folder.is_symlink() and home != data_dir.resolve()
        if is_elsewhere and (home / BUILD_NAME).exists():
            problem = f"is a link into another data set, {home}"
            raise UserError(f"{folder}: {problem}; remove it, or copy what it leads to")


def write_tokenizer(output_dir: Path, tokenizer: LoadedTokenizer) -> None:
    """The copy of the tokenizer beside the shards.

    A link there goes, its target stays, and so do files not ours.
    """
    directory = output_dir / TOKENIZER_NAME
    if directory.is_symlink():
        directory.unlink()
    for name in {*TOKENIZER_FILES, CHAT_TEMPLATE_NAME} - tokenizer.files.keys():
        (directory / name).unlink(missing_ok=True)
    for name, content in tokenizer.files.items():
        write_durably(directory / name, content)


def remove_strays(output_dir: Path, known: AbstractSet[str]) -> None:
    """Remove what earlier builds left of units that are no longer part of the data set.

    Nothing that builds don't write is removed, and nothing behind a link; `verify` names what else
    is there. `known` holds the paths that stay, relative to the directory.
    """
    for name in (SHARDS_NAME, UNITS_NAME):
        folder = output_dir / name
        if folder.is_symlink():
            continue
        for path in sorted(folder.rglob("*")):
            place = path.relative_to(output_dir).as_posix()
            if path.is_file() and place not in known and layout.is_written_by_builds(place):
                path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A small JSON file, durably."""
    text = json.dumps(content, indent=1)
    write_durably(path, f"{text}\n".encode())
