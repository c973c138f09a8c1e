"""Builds the units of bad shards again, from their sources, and puts them in place.

They are built beside, and take the place of what is there only if they are, digest for digest, what
the manifest says.
"""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.building.build_plan import Plan, make_plan
from data_prep.building.mixture import Mixture, load_mixture, mixture_path
from data_prep.building.output_dir import BUILD_NAME, refuse_shared_folders, write_tokenizer
from data_prep.building.ranks import Communicator, Progress
from data_prep.building.unit_records import shard_path
from data_prep.building.unit_shards import UnitBuilder
from data_prep.errors import UserError, parse_json
from data_prep.files import digest_file, write_durably
from data_prep.formats.work_unit import WorkUnit
from data_prep.layout import SPLITS
from data_prep.manifest import Manifest, Shard
from data_prep.shards import TOKENIZER_NAME, tokenizer_sha256
from data_prep.tokenizer.load import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class BuiltFrom:
    """What build.json tells of what a data set was built from; None where it doesn't."""

    mixture: Path | None
    tokenizer: Path | None


def repair(
    data_dir: Path, manifest: Manifest, bad: Sequence[Shard], mixture_name: str | None
) -> None:
    """Build the units of bad shards again, and put them in place.

    Raises UserError, and touches no shard, if a source or the tokenizer is another one by now, or
    is not where it was. `mixture_name` says where the mixture file is, if it was moved.
    """
    refuse_shared_folders(data_dir)
    threads = len(os.sched_getaffinity(0))
    is_own_good = tokenizer_sha256(data_dir / TOKENIZER_NAME) == manifest.tokenizer_sha256
    mixture = find_mixture(data_dir, mixture_name, with_own_tokenizer=is_own_good)
    tokenizer = load_tokenizer(mixture.tokenizer_dir, prefer="gigatoken", threads=threads)
    # Its own copy is the one even where an earlier version kept an `auto_map` in it, which loading
    # leaves out.
    if not is_own_good:
        if tokenizer.sha256 != manifest.tokenizer_sha256:
            problem = f"not the tokenizer that made {data_dir}"
            raise UserError(f"{tokenizer.directory}: {problem}; bring that one back")
        write_tokenizer(data_dir, tokenizer)
    plan = make_plan(mixture, tokenizer, None, data_dir)
    with tempfile.TemporaryDirectory(prefix="repair.", dir=data_dir) as scratch:
        builder = UnitBuilder(
            output_dir=Path(scratch),
            tokenizer=tokenizer,
            prefer="gigatoken",
            threads=threads,
            validation_fraction=manifest.validation_fraction,
        )
        units = units_of(plan, bad)
        size_bytes = sum(unit.size_bytes for unit in units)
        builder.build(units, Progress(Communicator(), size_bytes))
        for shard in bad:
            check_rebuilt(Path(scratch), shard)
        for name in sorted({name for shard in bad for name in shard.digests}):
            write_durably(data_dir / name, Path(scratch, name).read_bytes())
            print(f"repaired: {data_dir / name}")


def find_mixture(data_dir: Path, name: str | None, with_own_tokenizer: bool) -> Mixture:
    """The mixture that a data set was built from, by its name or as build.json tells.

    With the data set's own copy of the tokenizer, or else the one that build.json tells.
    """
    built = built_from(data_dir)
    path = built.mixture or Path("its mixture file")
    if name:
        path = mixture_path(name)
    if not path.is_file():
        problem = f"not there, and {data_dir} was built from it"
        raise UserError(f"{path}: {problem}; say where it is with --mixture FILE")
    if not name:
        print(f"repairing by {path}, as {data_dir / BUILD_NAME} says")
    if with_own_tokenizer:
        return load_mixture(path, data_dir / TOKENIZER_NAME)
    return load_mixture(path, built.tokenizer)


def built_from(data_dir: Path) -> BuiltFrom:
    """The paths of mixture and tokenizer that build.json tells."""
    told: Any = None
    # A repair needs no build.json: where it is missing or damaged, --mixture says the same.
    with contextlib.suppress(OSError, UserError):
        told = parse_json((data_dir / BUILD_NAME).read_bytes(), BUILD_NAME, "")
    if not isinstance(told, dict):
        return BuiltFrom(mixture=None, tokenizer=None)
    return BuiltFrom(
        mixture=_path_or_none(told.get("mixture")), tokenizer=_path_or_none(told.get("tokenizer"))
    )


def _path_or_none(told: object) -> Path | None:
    """A path as builds write it: absolute. Others come from a damaged file."""
    if isinstance(told, str) and told.isprintable() and told.startswith("/"):
        return Path(told)
    return None


def units_of(plan: Plan, shards: Sequence[Shard]) -> list[WorkUnit]:
    """The units that some shards were built from."""
    wanted = {shard.path for shard in shards}
    found = []
    for unit in plan.units:
        paths = {shard_path(split, unit) for split in SPLITS}
        if paths & wanted:
            found.append(unit)
    return found


def check_rebuilt(scratch: Path, shard: Shard) -> None:
    """Raise UserError unless both files of a shard were built again, digest for digest."""
    for name, digest in shard.digests.items():
        rebuilt = scratch / name
        if not rebuilt.is_file() or digest_file(rebuilt) != digest:
            last_row = shard.first_row + shard.rows - 1
            rows = f"{shard.inputs[0]}: rows {shard.first_row} to {last_row}"
            problem = f"not the text any more that {shard.path} was made of"
            raise UserError(f"{rows}: {problem}; bring it back")
