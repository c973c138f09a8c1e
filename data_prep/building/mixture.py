"""The mixture file: which sources, which weights, which tokenizer.

Relative paths are relative to the mixture file. Unknown keys are errors that name the nearest right
one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic
from pydantic import BaseModel, BeforeValidator, Field

from data_prep.errors import UserError, first_problem, nearest, parse_yaml
from data_prep.formats.known import FORMATS
from data_prep.inputs.urls import without_credentials
from data_prep.manifest import BLOCK_SAMPLES, integer_shares

MIXTURES_DIR = Path(__file__).parents[1] / "mixtures"
HUB_KEYS = {"config", "split", "revision"}
MAX_WEIGHT = 1e15  # tokens would do; a sum of them is a number

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[
    tuple[Text, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
# YAML leaves 2e-1 as text, which float reads
Number = Annotated[
    float,
    Field(strict=True),
    BeforeValidator(lambda value: float(value) if isinstance(value, str) else value),
]


class MixtureSource(BaseModel, frozen=True, extra="forbid"):
    """One named part of the corpus."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # it names a directory
    weight: Number = Field(gt=0, le=MAX_WEIGHT)
    path: Text | None = None  # file, glob or URL, as written; None for a data set of the hub
    hub: Text | None = None  # owner/name
    config: Texts = ()  # of the hub data set
    split: Text = "train"
    revision: Text | None = None
    format: str | None = None  # None: the files' names tell
    text_field: Text = "text"
    license: Text | None = None  # of the texts, handed on to the model card

    @pydantic.model_validator(mode="after")
    def check(self) -> Self:
        """What no key tells alone."""
        given = self.model_fields_set
        if ("path" in given) == ("hub" in given):
            raise ValueError("expected either path or hub; see data_prep/mixtures/example.yaml")
        if "path" in given and (meaningless := sorted(HUB_KEYS & given)):
            raise ValueError(f"{meaningless[0]} has a meaning only beside hub; remove it")
        if self.format not in (None, *FORMATS):
            raise ValueError(f"format {self.format!r}, expected one of {', '.join(FORMATS)}")
        has_field = self.format is None or FORMATS[self.format].has_text_field
        if "text_field" in given and not has_field:
            raise ValueError(f"text_field has no meaning for {self.format}; remove it")
        return self

    @property
    def origin(self) -> str:
        """Where the source comes from, as the manifest says it: without a URL's secrets."""
        return (
            without_credentials(self.path or "")
            or f"hf://datasets/{self.hub} {' + '.join(self.config) or 'default'} {self.split}"
        )


class MixtureFile(BaseModel, extra="forbid"):
    """A mixture as it is written."""

    tokenizer: Text | None = None
    validation_fraction: Number = Field(gt=0, lt=1)
    on_bad_document: Literal["error", "skip"] = "error"
    allow_lossy_tokenizer: bool = Field(default=False, strict=True)
    max_bad_fraction: Number = Field(default=0.01, ge=0, le=1)
    sources: tuple[MixtureSource, ...] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A checked mixture file."""

    path: Path  # of the mixture file
    tokenizer_dir: Path
    validation_fraction: float
    skip_bad: bool
    sources: tuple[MixtureSource, ...]
    allow_lossy: bool = False  # more than MAX_UNKNOWN_SHARE of the tokens may be unk
    # of a source's rows; more of them are an error, even where bad ones are skipped
    max_bad_fraction: float = 0.01


def mixture_path(name: str) -> Path:
    """The file of a shipped mixture's name, or the path itself."""
    shipped = sorted(path.stem for path in MIXTURES_DIR.glob("*.yaml"))
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    if name not in shipped:
        raise UserError(
            f"--mixture {name}: no such mixture; give a .yaml file or one of {', '.join(shipped)}"
        )
    return MIXTURES_DIR / f"{name}.yaml"


def load_mixture(path: Path, tokenizer: Path | None = None) -> Mixture:
    """Read and check a mixture file; a tokenizer given here takes the place of the file's.

    Raises UserError naming the file and key.
    """
    try:
        written = MixtureFile.model_validate(parse_yaml(path.read_bytes(), str(path)))
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {first_problem(error, _nearest_key)}") from None
    sources = written.sources
    names = [source.name for source in sources]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two sources are named {repeated[0]!r}; give each its own name")
    for source, share in zip(
        sources, integer_shares([source.weight for source in sources]), strict=True
    ):
        if not share:
            problem = f"weight {source.weight:g} is below 1/{BLOCK_SAMPLES} of the whole"
            raise UserError(
                f"{path}: source {source.name!r}: {problem}; raise it, or leave that source out"
            )
    if not (tokenizer or written.tokenizer):
        raise UserError(
            f"{path}: 'tokenizer' is missing, and no --tokenizer was given; train one first"
        )
    return Mixture(
        path=path, tokenizer_dir=tokenizer or path.parent / str(written.tokenizer), sources=sources,
        validation_fraction=written.validation_fraction, skip_bad=written.on_bad_document == "skip",
        allow_lossy=written.allow_lossy_tokenizer,
        max_bad_fraction=written.max_bad_fraction,
    )  # fmt: skip


def _nearest_key(place: str) -> str:
    """A suggestion for a misspelt key, such as `sources.0.wieght`."""
    return nearest(
        place.rpartition(".")[2], (MixtureSource if "." in place else MixtureFile).model_fields
    )
