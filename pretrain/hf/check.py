"""Whether an export is whole and right, told without the run that it was made from.

This is `export_hf --check DIR`.

Compared are its files with the digests in its marker; its modelling file, configuration and weights
with each other (pretrain/hf/check_model.py); its tokenizer with what an export is made to hold
today (pretrain/hf/check_tokenizer.py); and, where nothing was wrong so far, what its weights
compute with its certificate (pretrain/hf/proof/prove.py). Nothing of the export is executed:
weights are run by transformers' own class or by this version's modelling file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import digest_file
from data_prep.shards import read_tokenizer
from pretrain.data.tokenizer import CONFIG_NAME
from pretrain.hf.architectures import ARCHITECTURES
from pretrain.hf.certificate import CERTIFICATE_NAME, read_certificate
from pretrain.hf.check_model import (
    WRONG_WITH_A_CACHE,
    is_of_an_export,
    model_problems,
    read_model,
    read_object,
)
from pretrain.hf.check_tokenizer import tokenizer_problems
from pretrain.hf.marker import MARKER_NAME, Marker, read_marker
from pretrain.hf.names import AGAIN, CARD_NAME, CONFIG_FILE, GPT_NEOX, MODELING_FILE, WEIGHTS_FILE
from pretrain.hf.proof.prove import Repeated, repeat
from pretrain.hf.tokenizer import as_exported


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of an export; without problems it is whole and right."""

    about: str
    notes: tuple[str, ...]  # what does no harm
    problems: tuple[str, ...]  # each a line: where, what, and what to do
    certificate: str | None = None  # what came of repeating it; None where that was not done


def check_export(directory: Path) -> Verdict:
    """Look at an export. Raises UserError where there is none."""
    marker = read_marker(directory)
    has_config = (directory / CONFIG_FILE).is_file()  # an export in GGUF has none
    if marker is None and not has_config:
        raise UserError(
            f"{directory}: no export: neither {CONFIG_FILE} nor a good {MARKER_NAME} is there"
        )
    problems: list[str] = []
    if marker is not None:
        problems.extend(file_problems(directory, marker))
    elif (directory / MARKER_NAME).exists():
        problems.append(
            f"{directory / MARKER_NAME}: damaged, so that nothing here is known to be whole; "
            f"{AGAIN}"
        )
    if has_config:
        # Those that come before a file that can't be read are kept.
        try:
            problems.extend(content_problems(directory, marker))
            problems.extend(certificate_problems(directory, marker))
        except UserError as error:
            problems.append(str(error))
    repeated = None
    # What is known to be damaged is not loaded.
    if has_config and not problems:
        repeated = repeat_certificate(directory)
        problems.extend(repeated.problems if repeated else ())
    return Verdict(
        about=describe(directory, marker),
        notes=tuple(notes(directory, marker)),
        problems=tuple(problems),
        certificate=repeated.about if repeated else None,
    )


def certificate_problems(directory: Path, marker: Marker | None) -> Iterator[str]:
    """Where a certificate is of another export, or of other weights.

    Raises UserError for one that is damaged. All other files are looked at by what they hold: a
    tokenizer may have been saved again, a modelling file mended.
    """
    certificate = read_certificate(directory)
    if certificate is None:
        return
    path = directory / CERTIFICATE_NAME
    if marker is not None and certificate.identity != marker.identity:
        yield f"{path}: of another export than {MARKER_NAME} tells; {AGAIN}"
    weights = directory / WEIGHTS_FILE
    digest = certificate.files.get(WEIGHTS_FILE)
    # Of what is missing, and of what differs from the marker too, that was told.
    is_told = marker is not None and differs(directory, WEIGHTS_FILE, marker)
    if weights.is_file() and not is_told and digest_file(weights) != digest:
        yield f"{weights}: differs from its digest in {CERTIFICATE_NAME}; {AGAIN}"


def repeat_certificate(directory: Path) -> Repeated | None:
    """What an export's weights compute, beside what its certificate tells; None without one."""
    certificate = read_certificate(directory)
    if certificate is None:
        return None
    try:
        return repeat(directory, certificate)
    except UserError as error:
        return Repeated(about="could not be repeated", problems=(str(error),))


def content_problems(directory: Path, marker: Marker | None) -> Iterator[str]:
    """What is wrong with an export in Hugging Face format, whatever its digests say."""
    model = read_model(directory)
    yield from model_problems(directory, model, has_marker=marker is not None)
    if is_of_an_export(model):
        yield from tokenizer_problems(directory, model)


def describe(directory: Path, marker: Marker | None) -> str:
    """What an export says of itself."""
    if marker is None:
        return f"{directory}: an export without a good {MARKER_NAME}"
    return f"{directory}: {marker.architecture} in {marker.dtype}, after step {marker.step:,}"


def notes(directory: Path, marker: Marker | None) -> Iterator[str]:
    """What is worth knowing and does no harm."""
    if marker is None:
        yield (
            f"there is no good {MARKER_NAME} (exports made by early versions have none): edits "
            "can't be told"
        )
        return
    if marker.architecture in ARCHITECTURES and CERTIFICATE_NAME not in marker.files:
        yield (
            f"there is no {CERTIFICATE_NAME} (early versions made none): what the weights compute "
            "was not looked at"
        )
    for name in marker.files:
        if not differs(directory, name, marker):
            continue
        # People complete the card before they publish: that is what it is for.
        if name == CARD_NAME:
            yield f"{name} was edited; nothing loads it"
        elif is_mended(directory, name, marker):
            yield f"{name} was exchanged, and is as exports are made today"
    own = {*marker.files, MARKER_NAME}
    more = sorted(path.name for path in directory.iterdir() if path.name not in own)
    if more:
        yield f"not of the export, and not looked at: {', '.join(more)}"


def differs(directory: Path, name: str, marker: Marker) -> bool:
    """Whether a file is there and not as it was exported."""
    path = directory / name
    return path.is_file() and digest_file(path) != marker.files.get(name)


def is_mended(directory: Path, name: str, marker: Marker) -> bool:
    """Whether a file is not as it was exported, but as an export made today would hold it.

    That is what the advice given here leads to.
    """
    if name == MODELING_FILE.name:
        return digest_file(directory / name) == digest_file(MODELING_FILE)
    if name != CONFIG_NAME:
        return False
    try:
        told = read_object(directory / CONFIG_NAME)
        today = as_exported(
            read_tokenizer(directory),
            directory,
            told.get("model_max_length", 0),
            names_unknown=marker.architecture == GPT_NEOX,
        )
    except UserError:
        return False  # It is said when the tokenizer is looked at.
    return bool(json.loads(today.files[CONFIG_NAME]) == told)


def file_problems(directory: Path, marker: Marker) -> Iterator[str]:
    """Files that are not as they were exported."""
    for name in marker.files:
        path = directory / name
        if not path.is_file():
            yield f"{path}: missing; {AGAIN}"
        elif differs(directory, name, marker) and not is_said_elsewhere(directory, name, marker):
            yield f"{path}: differs from its digest, so it is damaged or was edited; {AGAIN}"


def is_said_elsewhere(directory: Path, name: str, marker: Marker) -> bool:
    """Whether a file that differs is told of in other words.

    A modelling file of an early version is told of with the model, what does no harm as a note.
    """
    if name == MODELING_FILE.name and digest_file(directory / name) in WRONG_WITH_A_CACHE:
        return True
    return name == CARD_NAME or is_mended(directory, name, marker)
