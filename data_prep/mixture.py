"""The mixture file: which sources, which weights, which tokenizer. Read by `build_shards`.

Relative paths are relative to the mixture file. Unknown keys are errors that name the nearest right one.
"""

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError, parse_yaml
from data_prep.shards import BLOCK_SAMPLES, integer_shares
from data_prep.work_units import FORMATS, FORMATS_WITHOUT_FIELD

MIXTURE_KEYS = ("tokenizer", "validation_fraction", "on_bad_document", "sources")
MIXTURES_DIR = Path(__file__).parent / "mixtures"
HUB_KEYS = ("config", "split", "revision")
TEXT_KEYS = ("name", "path", "hub", "split", "revision", "text_field", "license")
SOURCE_KEYS = (*TEXT_KEYS, "config", "format", "weight")
BAD_DOCUMENT_POLICIES = ("error", "skip")
MAX_WEIGHT = 1e99  # so that a sum of them is a number


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One named part of the corpus."""

    name: str
    weight: float
    path: str | None = None  # file, glob or URL, as written; None for a data set of the hub
    hub: str | None = None  # owner/name
    configs: tuple[str, ...]  # of the hub data set
    split: str = "train"
    revision: str | None = None
    format: str | None  # None: the files' names tell
    text_field: str = "text"
    license: str | None = None  # of the texts, handed on to the model card

    @property
    def origin(self) -> str:
        """Where the source comes from, as the manifest says it."""
        return self.path or f"hf://datasets/{self.hub} {' + '.join(self.configs) or 'default'} {self.split}"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A checked mixture file."""

    path: Path  # of the mixture file
    tokenizer_dir: Path
    validation_fraction: float
    skip_bad: bool
    sources: tuple[MixtureSource, ...]


def mixture_path(name: str) -> Path:
    """The file of a shipped mixture's name, or the path itself."""
    shipped = sorted(path.stem for path in MIXTURES_DIR.glob("*.yaml"))
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    if name not in shipped:
        raise UserError(f"--mixture {name}: no such mixture; give a .yaml file or one of {', '.join(shipped)}")
    return MIXTURES_DIR / f"{name}.yaml"


def load_mixture(path: Path, tokenizer: Path | None = None) -> Mixture:
    """Read and check a mixture file; a tokenizer given here takes the place of the file's.

    Raises UserError naming the file and key.
    """
    content = parse_yaml(path.read_bytes(), str(path))
    _check_keys(content, MIXTURE_KEYS, ("validation_fraction", "sources"), str(path))
    policy = content.get("on_bad_document", "error")
    if policy not in BAD_DOCUMENT_POLICIES:
        raise UserError(f"{path}: on_bad_document is {policy!r}, expected one of {', '.join(BAD_DOCUMENT_POLICIES)}")
    fraction = _number(content["validation_fraction"], f"{path}: validation_fraction")
    if not 0 < fraction < 1:
        raise UserError(f"{path}: validation_fraction is {fraction}, expected above 0 and below 1, such as 0.005")
    if not isinstance(content["sources"], list) or not content["sources"]:
        raise UserError(f"{path}: sources: expected a list of at least one source")
    sources = tuple(_source(item, f"{path}: sources[{i}]") for i, item in enumerate(content["sources"]))
    names = [source.name for source in sources]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two sources are named {repeated[0]!r}; give each its own name")
    for source, share in zip(sources, integer_shares([source.weight for source in sources]), strict=True):
        if not share:
            problem = f"weight {source.weight:g} is below 1/{BLOCK_SAMPLES} of the whole"
            raise UserError(f"{path}: source {source.name!r}: {problem}; raise it, or leave that source out")
    if tokenizer is None and "tokenizer" not in content:
        raise UserError(f"{path}: 'tokenizer' is missing, and no --tokenizer was given; train one first")
    tokenizer = tokenizer or path.parent / _text(content["tokenizer"], f"{path}: tokenizer")
    return Mixture(
        path=path, tokenizer_dir=tokenizer, validation_fraction=fraction, skip_bad=policy == "skip", sources=sources
    )  # fmt: skip


def _check_keys(content: object, known: tuple[str, ...], required: tuple[str, ...], where: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected the keys {', '.join(known)}; see data_prep/mixtures/example.yaml")
    for key in content:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
            raise UserError(f"{where}: unknown key {key!r}; did you mean {nearest[0]!r}?")
    if missing := [key for key in required if key not in content]:
        raise UserError(f"{where}: {missing[0]!r} is missing; see data_prep/mixtures/example.yaml")


def _source(item: object, where: str) -> MixtureSource:
    _check_keys(item, SOURCE_KEYS, ("name", "weight"), where)
    assert isinstance(item, dict)
    texts = {key: _text(item[key], f"{where}: {key}") for key in TEXT_KEYS if key in item}
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name := texts["name"]):
        raise UserError(f"{where}: name {name!r}: expected letters, digits, '.', '_' and '-' (it names a directory)")
    if ("path" in item) == ("hub" in item):
        raise UserError(f"{where}: expected either path or hub; see data_prep/mixtures/example.yaml")
    if "path" in item and (meaningless := [key for key in HUB_KEYS if key in item]):
        raise UserError(f"{where}: {meaningless[0]} has a meaning only beside hub; remove it")
    format_ = item.get("format")
    if format_ is not None and format_ not in FORMATS:
        raise UserError(f"{where}: format {format_!r}, expected one of {', '.join(FORMATS)}")
    if format_ in FORMATS_WITHOUT_FIELD and "text_field" in item:
        raise UserError(f"{where}: text_field has no meaning for {format_}; remove it")
    weight = _number(item["weight"], f"{where}: weight")
    if not 0 < weight <= MAX_WEIGHT:
        raise UserError(f"{where}: weight is {weight}, expected a positive number up to {MAX_WEIGHT:g}")
    configs = item.get("config", [])
    configs = [configs] if isinstance(configs, str) else configs
    if not isinstance(configs, list) or not all(isinstance(config, str) and config for config in configs):
        raise UserError(f"{where}: config is {item['config']!r}, expected a name or a list of names")
    return MixtureSource(weight=weight, configs=tuple(configs), format=format_, **texts)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {value!r}, expected text")
    return value


def _number(value: object, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan  # YAML leaves 2e-1 as text, which float reads
    if not math.isfinite(number):
        raise UserError(f"{where} is {value!r}, expected a number")
    return number
