"""Proves that an export computes what its run's weights do, and repeats of it what can be."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_prep.errors import UserError
from pretrain.checkpoint.reader import Checkpoint
from pretrain.hf.architectures import auto_map
from pretrain.hf.certificate import (
    BOUNDS,
    CERTIFICATE_NAME,
    REPEATED,
    Certificate,
    Generation,
    Logits,
    Proof,
    RoundTrip,
    Sketch,
    beyond_bounds,
    beyond_in_text,
)
from pretrain.hf.check_model import read_object
from pretrain.hf.marker import run_recipe
from pretrain.hf.names import (
    AGAIN,
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    MODELING_FILE,
    TABLEFREE,
)
from pretrain.hf.proof.process import Answer, Request, clean_process
from pretrain.hf.proof.windows import (
    SEED,
    SKETCHED_POSITIONS,
    SKETCHED_WINDOWS,
    Ids,
    choose_windows,
    drawn_ids,
    prompts_of,
    size_of,
    threads_for,
    write_logits,
    write_texts,
)
from pretrain.modeling_tablefree import TableFreeConfig
from pretrain.run.starts import commit, version_of

# What a model is read from beside `config.json` and its weights; no program, and no pickle.
READ = (GENERATION_FILE, INDEX_FILE)
DIGITS = 6  # of a figure that is kept: as many as fp32 has, nearly
EXACT_DIGITS = 15  # of sums in fp64


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What an export was made from, and in which form."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer  # the data's own
    architecture: str
    dtype: str


def prove(staged: Path, subject: Subject, output: Path) -> Proof:
    """Compare an export, whole but for its card, with the class that trained it.

    It is in `staged`, and to be called `output`. Raises UserError where it can't be loaded, or is
    beyond a bound.
    """
    checkpoint = subject.checkpoint
    config = TableFreeConfig.from_dict(checkpoint.manifest.model_config)
    given = choose_windows(checkpoint, config.seq_len, config.vocab_size)
    length = min(SKETCHED_POSITIONS, config.seq_len)
    # Beside the export, on a disk that has room for it.
    with TemporaryDirectory(prefix="proof.", dir=staged.parent) as name:
        folder = Path(name)
        request = Request(
            export=staged,
            trusts_code=subject.architecture == TABLEFREE,
            prompts=prompts_of(given.ids, config.seq_len),
            context=config.seq_len,
            sketched_ids=folder / "sketched.npy",
            ids=folder / "ids.npy",
            logits=folder / "logits.npy",
            texts=folder / "texts.json",
            threads=threads_for(size_of(checkpoint)),
        )
        assert request.ids
        assert request.logits
        assert request.texts
        sketched = drawn_ids((SKETCHED_WINDOWS, length), config.vocab_size, SEED)
        np.save(request.sketched_ids, sketched)
        np.save(request.ids, given.ids)
        eos_id = checkpoint.manifest.data.eos_id
        write_texts(subject.tokenizer, given, eos_id, request.texts)
        write_logits(checkpoint, given, request.logits)
        answer = answer_to(request, folder, output)
    proof = Proof(
        windows=given.about,
        logits=Logits(**rounded(answer["logits"])),
        generation=Generation(**rounded(answer["generation"])),
        tokenizer=RoundTrip(**answer["tokenizer"]),
        sketch=sketch_of(answer, sketched, SEED),
        versions=answer["versions"],
    )
    for problem in beyond_bounds(proof, BOUNDS[subject.dtype]):
        raise UserError(
            f"{output}: not exported, since it would not compute what the run's weights do: "
            f"{problem}; " + advice_for(subject.dtype)
        )
    return proof


def write_certificate(
    directory: Path, subject: Subject, proof: Proof, digests: dict[str, str]
) -> Path:
    """Write the certificate of the files in a directory, all of which have their digest here."""
    checkpoint = subject.checkpoint
    certificate = Certificate(
        architecture=subject.architecture,
        dtype=subject.dtype,
        step=checkpoint.step,
        fingerprint=checkpoint.manifest.fingerprint,
        recipe=run_recipe(checkpoint),
        versions={**proof.versions, "tablefree": version_of("tablefree")},
        commit=commit(),
        files=dict(digests),
        bound=BOUNDS[subject.dtype],
        windows=proof.windows,
        logits=proof.logits,
        generation=proof.generation,
        tokenizer=proof.tokenizer,
        sketch=proof.sketch,
    )
    path = directory / CERTIFICATE_NAME
    path.write_bytes(certificate.to_bytes())
    return path


def advice_for(dtype: str) -> str:
    """What to do about an export that is beyond a bound."""
    if dtype == "float32":
        return "use other releases of torch and transformers, or report it"
    return "these weights don't bear that precision: export float32, or report it"


def answer_to(request: Request, folder: Path, output: Path) -> Answer:
    """What the clean process found. Raises UserError where it could not load the export."""
    answer = clean_process().ask(request, folder)
    error = answer.get("error")
    if error is not None:
        said = " ".join(error.split()).replace(str(request.export), str(output))
        raise UserError(
            f"{output}: can't be loaded and run without this project ({said}); use transformers "
            "4.57 or newer, or report it"
        )
    return answer


def sketch_of(answer: Answer, ids: Ids, seed: int) -> Sketch:
    """The record of a sketch."""
    windows, positions = ids.shape
    return Sketch(
        seed=seed,
        windows=windows,
        positions=positions,
        weights={
            name: float(f"{total:.{EXACT_DIGITS}g}") for name, total in answer["weights"].items()
        },
        **rounded(answer["sketch"]),
    )


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Numbers with the digits that are kept, those in lists too."""
    return {
        name: [shortened(each) for each in value] if isinstance(value, list) else shortened(value)
        for name, value in figures.items()
    }


def shortened(value: float) -> float:
    """A number to DIGITS digits, a whole one as it is."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """What was found of an export without its run."""

    about: str
    problems: tuple[str, ...]


def repeat(directory: Path, certificate: Certificate) -> Repeated:
    """Load an export as `prove` does, and compare with what its certificate keeps.

    Nothing of the export is executed: this version's modelling file takes the place of its own.
    Raises UserError where it can't be loaded.
    """
    kept = certificate.sketch
    config = read_object(directory / CONFIG_FILE)
    ids = drawn_ids((kept.windows, kept.positions), config["vocab_size"], kept.seed)
    with TemporaryDirectory(prefix="tablefree-check.") as name:
        folder = Path(name)
        request = Request(
            export=without_code(directory, folder / "export", certificate),
            trusts_code=certificate.architecture == TABLEFREE,
            prompts=prompts_of(ids, kept.positions),
            context=kept.positions,
            sketched_ids=folder / "sketched.npy",
            threads=threads_for(numbers_in(directory)),
        )
        np.save(request.sketched_ids, ids)
        answer = answer_to(request, folder, directory)
    sketch = sketch_of(answer, ids, kept.seed)
    difference = sketch.difference(kept)
    generation = Generation(**rounded(answer["generation"]))
    least = BOUNDS[certificate.dtype].logits * kept.spread
    versions = answer["versions"]
    about = (
        f"computes what its certificate tells to {difference:.2g} of the logits' spread (at most "
        f"{REPEATED:g}), by torch {versions['torch']} and transformers {versions['transformers']}"
    )
    return Repeated(
        about=about,
        problems=(
            *problems_of_weights(directory, sketch, kept),
            *problems_of_text(directory, generation, least),
        ),
    )


def numbers_in(directory: Path) -> int:
    """About how many parameters an export has, by the bytes of its weights."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) // 4


def problems_of_weights(directory: Path, found: Sketch, kept: Sketch) -> Iterator[str]:
    """Weights that are not the certificate's, or don't compute the same: a line or none."""
    difference = found.difference(kept)
    others = found.other_weights(kept)
    if others:
        why = f"{others[0]} and {len(others) - 1} more" if len(others) > 1 else others[0]
    elif not difference <= REPEATED:
        why = "they don't compute what they did"
    else:
        return
    yield (
        f"{directory}: its weights, or its config.json, are not those that were exported ({why}; "
        f"{difference:.2g} of the logits' spread apart, at most {REPEATED:g}); {AGAIN}, or remove "
        "the certificate of weights that were changed on purpose"
    )


def problems_of_text(directory: Path, generation: Generation, least: float) -> Iterator[str]:
    """Greedy text that is another with a cache or padding, a line each."""
    for problem in beyond_in_text(generation, least):
        yield f"{directory}: {problem}; {AGAIN}"


def without_code(directory: Path, view: Path, certificate: Certificate) -> Path:
    """A folder of links to what of an export is read and not run.

    The form that needs a modelling file gets this version's, and a configuration that names it.
    """
    view.mkdir()
    for path in directory.iterdir():
        if path.is_file() and (path.suffix == ".safetensors" or path.name in READ):
            (view / path.name).symlink_to(path.resolve())
    config = read_object(directory / CONFIG_FILE)
    config.pop("auto_map", None)
    if certificate.architecture == TABLEFREE:
        shutil.copyfile(MODELING_FILE, view / MODELING_FILE.name)
        config["auto_map"] = auto_map()
    (view / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return view
