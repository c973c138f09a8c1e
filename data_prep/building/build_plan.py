"""The plan of a build: the files of a mixture's sources, cut into work units, and who takes which.

Made by `build_shards`, and by `verify` to build a part again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.building.mixture import Mixture, MixtureSource
from data_prep.building.unit_records import read_record, record_path, unit_signature
from data_prep.building.work_units import SourceInputs, apart, cut_units
from data_prep.errors import UserError
from data_prep.formats.known import find_files, format_of, text_field_of, with_files_beside
from data_prep.formats.work_unit import WorkUnit
from data_prep.inputs.local_files import refuse_inside
from data_prep.inputs.sources import InputFile, find_hub_inputs
from data_prep.tokenizer.load import LoadedTokenizer


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """What the manifest says of a source, apart from counts.

    A plan's signature is made of these fields, in this order: another order would be another one,
    and finished builds would no longer be known as such.
    """

    name: str
    weight: float
    origin: str
    format: str
    text_field: str | None
    revision: str | None
    license: str | None


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What tells, in build.json, whose units lie in a directory."""

    signature: str  # of sources, units and tokenizer, as they lie on this machine
    tokenizer_sha256: str
    origins: list[list[str]]  # of each source its name and origin; lists, as JSON gives them back


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be built, from what."""

    mixture: Mixture
    sources: tuple[PlannedSource, ...]
    units: tuple[WorkUnit, ...]
    identity: Identity


class SourceFiles(NamedTuple):
    """The files of a source, as they were found."""

    files: list[InputFile]
    format: str
    revision: str | None  # of a data set of the hub


def make_plan(
    mixture: Mixture,
    tokenizer: LoadedTokenizer,
    output_dir: Path | None = None,
    built_dir: Path | None = None,
) -> Plan:
    """Find the files of a mixture and cut them into units.

    Units that are built already, in `built_dir` or else in the output directory, stay cut as they
    were. Raises UserError if files lie in the output directory.
    """
    built_dir = built_dir or output_dir
    if output_dir:
        tokenizer_file = tokenizer.directory.absolute() / "tokenizer.json"
        refuse_inside(output_dir, [str(tokenizer_file)], f"{mixture.path}: tokenizer")
    sources: list[PlannedSource] = []
    units: list[WorkUnit] = []
    for source in mixture.sources:
        where = f"{mixture.path}: source {source.name!r}"
        found = source_files(mixture.path.parent, source, where)
        if output_dir:
            refuse_inside(output_dir, (file.url for file in found.files), where)
        if not any(file.size for file in found.files):
            raise UserError(f"{where}: {source.origin} is empty; check it or leave it out")
        planned = planned_source(source, found)
        sources.append(planned)
        inputs = SourceInputs(
            source=planned.name,
            files=found.files,
            format=planned.format,
            text_field=planned.text_field,
            skip_bad=mixture.skip_bad,
            eos_id=tokenizer.eos_id,
        )
        cut = cut_units(inputs)
        if built_dir:
            cut = cut_as_before(cut, built_dir, tokenizer.sha256, mixture.validation_fraction)
        units += cut
    identity = identify(mixture, tokenizer, sources, units)
    return Plan(mixture=mixture, sources=tuple(sources), units=tuple(units), identity=identity)


def planned_source(source: MixtureSource, found: SourceFiles) -> PlannedSource:
    """What the manifest says of a source, apart from counts."""
    return PlannedSource(
        name=source.name,
        weight=source.weight,
        origin=source.origin,
        format=found.format,
        text_field=text_field_of(found.format, source.text_field),
        revision=found.revision,
        license=source.license,
    )


def identify(
    mixture: Mixture,
    tokenizer: LoadedTokenizer,
    sources: Sequence[PlannedSource],
    units: Sequence[WorkUnit],
) -> Identity:
    """What tells this build from others."""
    fraction = mixture.validation_fraction
    about = [
        [asdict(source) for source in sources],
        [unit_signature(unit, tokenizer.sha256, fraction) for unit in units],
        mixture.skip_bad,
    ]
    return Identity(
        signature=hashlib.sha256(json.dumps(about).encode()).hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
        origins=[[source.name, source.origin] for source in sources],
    )


def cut_as_before(
    units: list[WorkUnit], output_dir: Path, tokenizer_sha256: str, validation_fraction: float
) -> list[WorkUnit]:
    """The units of a source; or each small file by itself, where one was built so.

    So data sets made before small files shared units are gone on with, repaired and built anew as
    they are.
    """
    separate = apart(units)
    if len(separate) == len(units):
        return units
    for unit in separate:
        path = output_dir / record_path(unit)
        if not path.is_file():
            continue
        signature = unit_signature(unit, tokenizer_sha256, validation_fraction)
        if read_record(path, signature):
            return separate
    return units


def source_files(base: Path, source: MixtureSource, where: str) -> SourceFiles:
    """The files of a source, their format, and the revision if they are of the hub.

    Raises UserError, which begins with `where`, if there are none or they can't be read as the
    source says.
    """
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
        named = " and ".join(sorted(formats))
        raise UserError(f"{where}: files of formats {named}; make each a source of its own")
    return SourceFiles(files, formats.pop(), revision)


def assign(units: Sequence[WorkUnit], ranks: int) -> list[list[WorkUnit]]:
    """Units of each rank: largest first to the least loaded, each rank's in the plan's order."""
    loads = [0] * ranks
    owner: dict[int, int] = {}

    def largest_first(i: int) -> tuple[int, int]:
        return -units[i].size_bytes, i

    for i in sorted(range(len(units)), key=largest_first):
        rank = loads.index(min(loads))
        loads[rank] += units[i].size_bytes
        owner[i] = rank
    return [[unit for i, unit in enumerate(units) if owner[i] == rank] for rank in range(ranks)]
