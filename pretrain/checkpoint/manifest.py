"""What a checkpoint says of itself: the record behind `manifest.json`, which this module alone
writes and reads.

A manifest names every file of its checkpoint with size and digest, and all that a run must be the
same in to go on from it. Manifests of earlier versions lack what has a default here.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from data_prep.files import digest_file
from pretrain.checkpoint.layout import MANIFEST_NAME, OWN_FILE
from pretrain.data.stages import DataStage, stages_of_json

FORMAT = "tablefree-checkpoint"
FORMAT_VERSION = 1

Json = dict[str, Any]  # an object of JSON that another record knows the fields of


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """A file of one rank: its part of every parameter."""

    name: str
    bytes: int
    xxh3_128: str
    fragments: dict[str, list[int]]  # parameter -> its first element here, and how many


@dataclass(frozen=True, kw_only=True)
class AboutData:
    """What an export must know of the data set that a run was trained on."""

    eos_id: int
    tokenizer_sha256: str | None = None
    sources: list[Json]  # as the data set's manifest has them, without secrets of URLs
    loss: str | None = None  # what the tokenizer lost of the text, in words

    def to_json(self) -> Json:
        """As it stands in the file, where a loss is told of only if there is one."""
        content = asdict(self)
        if self.loss is None:
            del content["loss"]
        return content


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """The state of a run after `step` steps: what it was, and which files hold it.

    `optimizer_step` counts the updates among these steps; a skipped step has none.
    """

    step: int
    optimizer_step: int
    seed: int
    fingerprint: str  # of the data set; of several, that of the newest stage
    data_dir: str
    data: AboutData
    skips: tuple[Json, ...] = ()  # the decisions on bad steps so far: run/bad_steps.py
    recent_steps: tuple[tuple[float, float], ...] = ()  # loss and gradient norm, oldest first
    recipe: Json  # config.load.build_recipe makes a Recipe of it
    deepspeed: Json  # the engine's merged configuration
    model_config: Json  # of modeling_tablefree.TableFreeConfig
    parameters: dict[str, list[int]]  # the shape of every trained parameter
    files: tuple[SavedFile, ...] = ()  # none until they are written
    # Where the weights are from that no step of this project made; such a checkpoint is of step 0,
    # of no data set yet, and its engine is empty.
    imported_from: str | None = None
    # The data sets of a run that had several, oldest first; empty of one: see `data_stages`.
    stages: tuple[DataStage, ...] = ()

    @property
    def data_stages(self) -> tuple[DataStage, ...]:
        """The data sets that its steps were trained on, oldest first; none of imported weights."""
        if self.stages or not self.fingerprint:
            return self.stages
        only = DataStage(
            fingerprint=self.fingerprint,
            data_dir=self.data_dir,
            sources=tuple(self.data.sources),
        )
        return (only,)

    def to_json(self) -> bytes:
        """The file's content."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "data": self.data.to_json(),
        }
        if self.imported_from is None:
            del content["imported_from"]
        if not self.stages:
            del content["stages"]
        return json.dumps(content, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Raises ValueError, KeyError, TypeError or AttributeError for what is no manifest."""
        told = json.loads(content)
        if told.get("format") != FORMAT or told.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{MANIFEST_NAME} is not of format {FORMAT} {FORMAT_VERSION}")
        files = tuple(saved_file(entry) for entry in told["files"])
        data = told["data"]
        return cls(
            step=told["step"],
            optimizer_step=told["optimizer_step"],
            seed=told["seed"],
            fingerprint=told["fingerprint"],
            data_dir=told["data_dir"],
            data=AboutData(
                eos_id=data["eos_id"],
                tokenizer_sha256=data.get("tokenizer_sha256"),
                sources=data["sources"],
                loss=data.get("loss"),
            ),
            skips=tuple(told.get("skips", ())),
            recent_steps=tuple((loss, norm) for loss, norm in told.get("recent_steps", ())),
            recipe=told["recipe"],
            deepspeed=told["deepspeed"],
            model_config=told["model_config"],
            parameters=told["parameters"],
            files=files,
            imported_from=told.get("imported_from"),
            stages=stages_of_json(told["stages"]) if "stages" in told else (),
        )


def saved_file(entry: Json) -> SavedFile:
    """An entry of `files`. Raises ValueError for a name that no checkpoint's file has."""
    name = entry["name"]
    # So that none outside of the checkpoint's directory is ever opened.
    if not OWN_FILE.fullmatch(name):
        raise ValueError(f"{MANIFEST_NAME} names {name!r}, which is no file of a checkpoint")
    return SavedFile(
        name=name,
        bytes=entry["bytes"],
        xxh3_128=entry["xxh3_128"],
        fragments=entry["fragments"],
    )


def sidecar_of(path: Path) -> bytes:
    """What a checkpoint's manifest makes the sidecar say, in the form that `xxh128sum --check`
    reads.
    """
    return f"{digest_file(path / MANIFEST_NAME)}  {MANIFEST_NAME}\n".encode()


def pointer_to(path: Path) -> bytes:
    """What a checkpoint makes the pointer say."""
    content = {"checkpoint": path.name, "manifest_xxh3_128": digest_file(path / MANIFEST_NAME)}
    return json.dumps(content).encode()
