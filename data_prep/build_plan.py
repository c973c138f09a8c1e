"""What is to be built, from what, and by whom: a mixture's files, cut into work units and dealt out to the ranks.

Used by `build_shards`, and by `verify` to build a part again. Nothing is written here.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.encode import LoadedTokenizer
from data_prep.errors import UserError
from data_prep.inputs import InputFile, find_hub_inputs, find_inputs
from data_prep.mixture import Mixture, MixtureSource
from data_prep.unit_shards import unit_signature
from data_prep.work_units import FORMATS_WITHOUT_FIELD, WorkUnit, cut_units, format_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be built, from what."""

    mixture: Mixture
    sources: tuple[dict[str, Any], ...]  # what the manifest says of each, apart from counts
    units: tuple[WorkUnit, ...]
    identity: dict[str, Any]  # what tells, in build.json, whose units lie in a directory


def make_plan(mixture: Mixture, tokenizer: LoadedTokenizer) -> Plan:
    """Find the files of a mixture and cut them into units."""
    units: list[WorkUnit] = []
    sources = []
    for source in mixture.sources:
        where = f"{mixture.path}: source {source.name!r}"
        files, format_, revision = source_files(mixture.path.parent, source, where)
        if not any(file.size for file in files):
            raise UserError(f"{where}: {source.origin} is empty; check it or leave it out")
        text_field = None if format_ in FORMATS_WITHOUT_FIELD else source.text_field
        units += cut_units(
            files, source=source.name, format=format_, text_field=text_field, skip_bad=mixture.skip_bad,
            eos_id=tokenizer.eos_id,
        )  # fmt: skip
        sources.append({
            "name": source.name, "weight": source.weight, "origin": source.origin, "format": format_,
            "text_field": text_field, "revision": revision, "license": source.license,
        })  # fmt: skip
    fraction = mixture.validation_fraction
    about = [sources, [unit_signature(unit, tokenizer.sha256, fraction) for unit in units], mixture.skip_bad]
    signature = hashlib.sha256(json.dumps(about).encode()).hexdigest()  # of all as it lies on this machine
    origins = [[source["name"], source["origin"]] for source in sources]
    identity = {"signature": signature, "tokenizer_sha256": tokenizer.sha256, "origins": origins}
    return Plan(mixture=mixture, sources=tuple(sources), units=tuple(units), identity=identity)


def source_files(base: Path, source: MixtureSource, where: str) -> tuple[list[InputFile], str, str | None]:
    """The files of a source, their format, and the revision if they are of the hub."""
    revision = None
    if source.hub:
        files, revision = find_hub_inputs(source.hub, source.config, source.split, source.revision, where)
    elif source.format == "save_to_disk":
        parts = find_inputs(base, f"{source.path}/*.arrow", where)
        state = find_inputs(base, f"{source.path}/state.json", where)[0]
        size, version = sum(file.size for file in parts), ",".join(file.version for file in parts)
        files = [replace(state, size=size, version=version)]
    else:
        files = find_inputs(base, source.path or "", where)
    if source.format == "megatron":
        indexes = [find_inputs(base, str(Path(file.name).with_suffix(".idx")), where)[0] for file in files]
        files = [replace(f, version=f"{f.version}, {i.version}") for f, i in zip(files, indexes, strict=True)]
    formats = {source.format or format_of(file.name, where) for file in files}
    if len(formats) > 1:
        raise UserError(f"{where}: files of formats {' and '.join(sorted(formats))}; make each a source of its own")
    return files, formats.pop(), revision


def assign(units: tuple[WorkUnit, ...], ranks: int) -> list[list[WorkUnit]]:
    """Units of each rank: largest first to the least loaded, each rank's in the order of the plan."""
    loads = [0] * ranks
    owner: dict[int, int] = {}
    for i in sorted(range(len(units)), key=lambda i: (-units[i].size_bytes, i)):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += units[i].size_bytes
    return [[unit for i, unit in enumerate(units) if owner[i] == rank] for rank in range(ranks)]
