"""What was proved of an export when it was made: its `certificate.json`.

A process that can't import this project loaded the export and compared it with the class that
trained it (pretrain/hf/proof). The certificate holds what came out, the digest of every file, where
the weights are from, and figures by which `export_hf --check` finds anywhere, without the run,
whether the weights still compute the same. No text of the data set is in it, and no time, duration
or host: made twice on one machine it is the same bit for bit. Machines may differ in the last
digits of figures.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError, parse_json
from pretrain.hf.names import AGAIN

CERTIFICATE_NAME = "certificate.json"
FORMAT = "tablefree-certificate"
VALIDATION = "validation"
DRAWN = "drawn"

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How far an export may be from the class that trained it."""

    logits: float  # any logit, of greedy text too; a share of the logits' spread
    loss: float  # nats a token


# By the precision of the weights. fp32: the forms add up in another order, which moves logits by
# 1e-6 of their spread for each of a few layers; a wrong weight, mask or position moves them by 1e-2
# and more. bfloat16 has 8 bits of a number, 4e-3 of it, which adds up over layers to some percent.
BOUNDS = {
    "float32": Bound(logits=2e-4, loss=1e-4),
    "bfloat16": Bound(logits=0.3, loss=0.03),
}
# Of the sketch's logits, as a share of their spread: between torch's kernels for AVX-512, AVX2 and
# none 3e-6 in 12 layers of width 512. A weight with its sign flipped moves one by 1e-5 to 1e-2.
REPEATED = 1e-4
# Of a sum over a tensor, whose fp64 sums differ by 1e-13 or so, as the order of additions does.
SUMMED = 1e-8


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What both models were given."""

    kind: str  # VALIDATION, or DRAWN: ids drawn from the vocabulary
    number: int
    positions: int  # of each, at which both predict
    of: int  # windows that there are
    why: str | None  # drawn, or fewer than all


@dataclass(frozen=True, kw_only=True)
class Logits:
    """The logits of an export beside those of the training class, on the fp32 masters."""

    largest_difference: float
    spread: float  # standard deviation of the training class's
    same_first_choice: float  # share of positions
    loss_as_trained: float  # nats a token
    loss_as_exported: float

    @property
    def relative(self) -> float:
        """The largest difference as a share of the spread."""
        return self.largest_difference / max(self.spread, torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy text with a cache, and as part of a batch padded on its left, beside that without.

    By how much the logits differ that each token was chosen by, as far as the texts are the same.
    """

    prompts: int
    new_tokens: int
    with_cache: float
    left_padded: float
    other_texts: int  # in the end, where two choices were as good as each other


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """The exported tokenizer beside the data's, on the text of the windows."""

    texts: int
    same_text: int  # its ids decode to
    same_ids: int  # it encodes to
    came_back: int  # ids that are the same after text: not those that begin within a word


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """Signed sums over the logits of drawn ids, and over the inputs of all, in fp32."""

    seed: int
    windows: int
    positions: int  # of each
    spread: float  # of the logits
    by_position: list[float]
    by_vocabulary: list[float]
    input_spread: float
    inputs: list[float]
    weights: dict[str, float]  # a signed sum over each tensor of the file

    def other_weights(self, other: "Sketch") -> list[str]:
        """Tensors that both have, with other sums.

        One that is saved under another name is not compared; what it computes is.
        """
        shared = self.weights.keys() & other.weights.keys()
        apart = {name: abs(self.weights[name] - other.weights[name]) for name in shared}
        return sorted(name for name, difference in apart.items() if not difference <= SUMMED)

    def difference(self, other: "Sketch") -> float:
        """The largest between two, as a share of the spreads; infinity where they don't compare."""
        sums = (
            (self.by_position, other.by_position, self.spread),
            (self.by_vocabulary, other.by_vocabulary, self.spread),
            (self.inputs, other.inputs, self.input_spread),
        )
        largest = 0.0
        for own, others, spread in sums:
            if len(own) != len(others):
                return float("inf")
            apart = (torch.tensor(own).double() - torch.tensor(others).double()).abs().max()
            # A NaN is no agreement.
            relative = apart.nan_to_num(float("inf")).item() / max(spread, 1e-30)
            largest = max(largest, relative)
        return largest


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the clean process found of an export."""

    windows: Windows
    logits: Logits
    generation: Generation
    tokenizer: RoundTrip
    sketch: Sketch
    versions: dict[str, str]  # of python, torch, transformers, tokenizers, safetensors


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The content of `certificate.json`."""

    architecture: str
    dtype: str
    step: int
    fingerprint: str  # of the data set
    recipe: dict[str, Any]  # as in the marker
    versions: dict[str, str]  # of the proof, and this project's
    commit: str | None  # of this project
    files: dict[str, str]  # name -> xxh3-128; not of this file and the marker
    bound: Bound
    windows: Windows
    logits: Logits
    generation: Generation
    tokenizer: RoundTrip
    sketch: Sketch
    format: str = FORMAT

    @property
    def identity(self) -> tuple[str, int, str, str]:
        """What was exported, and how; as of the marker."""
        return (self.fingerprint, self.step, self.architecture, self.dtype)

    def to_bytes(self) -> bytes:
        """The file, byte for byte reproducible."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


def read_certificate(directory: Path) -> Certificate | None:
    """The certificate of an export; None where there is none.

    Raises UserError for one that is damaged.
    """
    path = directory / CERTIFICATE_NAME
    if not path.is_file():
        return None
    content = parse_json(path.read_bytes(), str(path), AGAIN)
    try:
        parts = {
            "bound": Bound(**content["bound"]),
            "windows": Windows(**content["windows"]),
            "logits": Logits(**content["logits"]),
            "generation": Generation(**content["generation"]),
            "tokenizer": RoundTrip(**content["tokenizer"]),
            "sketch": Sketch(**content["sketch"]),
        }
        certificate = Certificate(**(content | parts))
        is_ours = certificate.format == FORMAT and isinstance(certificate.files, dict)
        # These raise unless it holds numbers.
        certificate.sketch.difference(certificate.sketch)
        certificate.sketch.other_weights(certificate.sketch)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: no certificate of an export ({error}); {AGAIN}") from None
    if not is_ours:
        raise UserError(f"{path}: no certificate of an export; {AGAIN}")
    return certificate


def beyond_bounds(proof: Proof, bound: Bound) -> Iterator[str]:
    """What in a proof is not as it has to be, each in words with its figure."""
    logits = proof.logits
    if not logits.relative <= bound.logits:
        yield (
            f"logits differ from the training class's by up to {logits.relative:.2g} of their "
            f"spread (at most {bound.logits:g})"
        )
    loss = abs(logits.loss_as_exported - logits.loss_as_trained)
    if not loss <= bound.loss:
        yield f"the loss differs by {loss:.2g} nats a token (at most {bound.loss:g})"
    yield from beyond_in_text(proof.generation, bound.logits * logits.spread)
    tokenizer = proof.tokenizer
    for what, same in (("text", tokenizer.same_text), ("ids", tokenizer.same_ids)):
        if same != tokenizer.texts:
            yield (
                f"the tokenizer gives other {what} for {tokenizer.texts - same} of "
                f"{tokenizer.texts} texts"
            )


def beyond_in_text(generation: Generation, most: float) -> Iterator[str]:
    """Ways to generate that give other logits than without a cache, by more than `most`.

    Within it greedy text may differ only where two choices are as good as each other.
    """
    ways = (("with a cache", generation.with_cache), ("left-padded", generation.left_padded))
    for way, difference in ways:
        if not difference <= most:
            yield (
                f"greedy text {way} is another: its logits differ by up to {difference:.2g} from "
                f"those without a cache (at most {most:.2g})"
            )
