"""The plan of a build: the files of a mixture's sources, cut into work units, and who takes which.

Read by `build_shards`, and by `verify` to build a part again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.building.mixture import Mixture, MixtureSource
from data_prep.building.unit_records import read_record, record_path, unit_signature
from data_prep.building.work_units import apart, cut_units
from data_prep.errors import UserError
from data_prep.formats.known import find_files, format_of, text_field_of, with_files_beside
from data_prep.formats.work_unit import WorkUnit
from data_prep.inputs.local_files import refuse_inside
from data_prep.inputs.sources import InputFile, find_hub_inputs
from data_prep.tokenizer.load import LoadedTokenizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be built, from what."""

    mixture: Mixture
    sources: tuple[dict[str, Any], ...]  # what the manifest says of each, apart from counts
    units: tuple[WorkUnit, ...]
    identity: dict[str, Any]  # what tells, in build.json, whose units lie in a directory


def make_plan(
    mixture: Mixture,
    tokenizer: LoadedTokenizer,
    output_dir: Path | None = None,
    built_dir: Path | None = None,
) -> Plan:
    """Find the files of a mixture and cut them into units, as units that are built already were
    cut.

    `built_dir`, or else the output directory, holds those. Raises UserError if files lie in the
    output directory.
    """
    built_dir = built_dir or output_dir
    fraction = mixture.validation_fraction
    if output_dir:
        tokenizer_file = str(tokenizer.directory.absolute() / "tokenizer.json")
        refuse_inside(output_dir, [tokenizer_file], f"{mixture.path}: tokenizer")
    units: list[WorkUnit] = []
    sources = []
    for source in mixture.sources:
        where = f"{mixture.path}: source {source.name!r}"
        files, format_, revision = source_files(mixture.path.parent, source, where)
        if output_dir:
            refuse_inside(output_dir, (file.url for file in files), where)
        if not any(file.size for file in files):
            raise UserError(f"{where}: {source.origin} is empty; check it or leave it out")
        text_field = text_field_of(format_, source.text_field)
        cut = cut_units(
            files,
            source=source.name,
            format=format_,
            text_field=text_field,
            skip_bad=mixture.skip_bad,
            eos_id=tokenizer.eos_id,
        )
        units += cut_as_before(cut, built_dir, tokenizer.sha256, fraction) if built_dir else cut
        sources.append(
            {
                "name": source.name,
                "weight": source.weight,
                "origin": source.origin,
                "format": format_,
                "text_field": text_field,
                "revision": revision,
                "license": source.license,
            }
        )
    about = [
        sources,
        [unit_signature(unit, tokenizer.sha256, fraction) for unit in units],
        mixture.skip_bad,
    ]
    # of all as it lies on this machine
    signature = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    origins = [[source["name"], source["origin"]] for source in sources]
    identity = {"signature": signature, "tokenizer_sha256": tokenizer.sha256, "origins": origins}
    return Plan(mixture=mixture, sources=tuple(sources), units=tuple(units), identity=identity)


def cut_as_before(
    units: list[WorkUnit], output_dir: Path, tokenizer_sha256: str, validation_fraction: float
) -> list[WorkUnit]:
    """The units of a source; where an output directory holds one of a small file by itself, each
    has its own there.

    So data sets made before small files shared units are gone on with, repaired and built anew as
    they are.
    """
    separate = apart(units)
    if len(separate) == len(units):
        return units
    for unit in separate:
        path = output_dir / record_path(unit)
        if path.is_file() and read_record(
            path, unit_signature(unit, tokenizer_sha256, validation_fraction)
        ):
            return separate
    return units


def source_files(
    base: Path, source: MixtureSource, where: str
) -> tuple[list[InputFile], str, str | None]:
    """The files of a source, their format, and the revision if they are of the hub."""
    revision = None
    if source.hub:
        files, revision = find_hub_inputs(
            source.hub, source.config, source.split, source.revision, where
        )
    else:
        files = find_files(source.format, base, source.path or "", where)
    files = with_files_beside(source.format, base, files, where)
    formats = {source.format or format_of(file.name, where) for file in files}
    if len(formats) > 1:
        raise UserError(
            f"{where}: files of formats {' and '.join(sorted(formats))}; make each a source of "
            "its own"
        )
    return files, formats.pop(), revision


def assign(units: tuple[WorkUnit, ...], ranks: int) -> list[list[WorkUnit]]:
    """Units of each rank: largest first to the least loaded, each rank's in the order of the
    plan.
    """
    loads = [0] * ranks
    owner: dict[int, int] = {}
    for i in sorted(range(len(units)), key=lambda i: (-units[i].size_bytes, i)):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += units[i].size_bytes
    return [[unit for i, unit in enumerate(units) if owner[i] == rank] for rank in range(ranks)]
