"""Scores a model on a text: on the whole, on each source, and on each document.

The figures are loss, perplexity and bits per byte, with intervals from documents drawn anew.

The text is one stream of ids, cut into windows (pretrain/evaluation/windows.py); each id after the
first is a target exactly once. Bits per byte = total nats / (ln 2 x UTF-8 bytes of the text):
unlike perplexity, it can be compared between tokenizers.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_prep.shards import ShardReader
from pretrain.checkpoint.reader import Checkpoint, load_model
from pretrain.evaluation.documents import DocumentScores
from pretrain.evaluation.intervals import Bootstrap, intervals
from pretrain.evaluation.open_run import (
    OpenCheckpoint,
    OpenRun,
    context_of,
    place_of_other_data,
)
from pretrain.evaluation.result import EvaluationResult, Score
from pretrain.evaluation.text import MeasuredText, validation_text
from pretrain.evaluation.windows import WindowBatch, Windows, windows_of
from pretrain.metrics.step_record import perplexity_of
from pretrain.model.chunked_cross_entropy import token_nats
from pretrain.model.loss import LanguageModelLoss


class Totals(NamedTuple):
    """What was summed over each document, in the order of the stream."""

    nats: npt.NDArray[np.float64]
    targets: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a model gave on a text."""

    result: EvaluationResult
    documents: DocumentScores


def score(nats: float, targets: int, text_bytes: int) -> Score:
    """The figures of a text that follow from total nats."""
    loss = math.nan
    if targets:
        loss = nats / targets
    bits_per_byte = math.nan
    if text_bytes:
        bits_per_byte = nats / (math.log(2) * text_bytes)
    return Score(
        targets=targets,
        text_bytes=text_bytes,
        loss=loss,
        perplexity=perplexity_of(loss),
        bits_per_byte=bits_per_byte,
    )


def score_of(documents: DocumentScores, how: Bootstrap) -> Score:
    """The figures of documents, with their intervals."""
    figures = score(
        math.fsum(documents.nats), int(documents.targets.sum()), int(documents.text_bytes.sum())
    )
    sure = intervals(documents, how)
    return replace(
        figures,
        documents=len(documents),
        loss_interval=sure.loss,
        bits_per_byte_interval=sure.bits_per_byte,
    )


@torch.inference_mode()
def nats_of(module: LanguageModelLoss, batch: WindowBatch) -> npt.NDArray[np.float64]:
    """Nats of a batch's counted targets, (B x counted,), in the order of the stream.

    Logits are made of the counted positions alone.
    """
    device = next(module.parameters()).device
    ids_BT = torch.from_numpy(batch.ids.astype(np.int64)).to(device)
    hidden_BTD = module.hidden_states(ids_BT[:, :-1])
    hidden_ND = hidden_BTD[:, -batch.counted :].flatten(0, 1)
    targets_N = ids_BT[:, -batch.counted :].flatten()
    nats_N = token_nats(hidden_ND, module.model.lm_head.weight, targets_N)
    # In fp64, so that a sum over a whole split keeps the digits that are printed.
    nats: npt.NDArray[np.float64] = nats_N.double().cpu().numpy()
    return nats


def document_totals(module: LanguageModelLoss, text: MeasuredText, windows: Windows) -> Totals:
    """Total nats and number of targets of each document."""
    documents = len(text.ends)
    nats = np.zeros(documents)
    targets = np.zeros(documents, np.int64)
    position = 1  # of the next target; the first id is none
    all_targets = text.stream.tokens - 1
    with tqdm(
        total=all_targets, unit="token", unit_scale=True, desc="evaluating", disable=None
    ) as progress:
        for batch in windows.batches(text.stream):
            of_targets = nats_of(module, batch)
            count = len(of_targets)
            positions = position + np.arange(count)
            document_of = np.searchsorted(text.ends, positions, side="right")
            first = int(document_of[0])
            in_batch = document_of - first
            touched = slice(first, int(document_of[-1]) + 1)
            nats[touched] += np.bincount(in_batch, weights=of_targets)
            targets[touched] += np.bincount(in_batch)
            position += count
            progress.update(count)
    return Totals(nats, targets)


def scoring_module(checkpoint: Checkpoint, eos_id: int) -> LanguageModelLoss:
    """The fp32 masters on this machine's device, to be scored as they were trained.

    That is with documents apart if the run had intra_document_masking.
    """
    # Not in the recipes of early checkpoints.
    is_masked = checkpoint.manifest.recipe.get("intra_document_masking", False)
    module = LanguageModelLoss(load_model(checkpoint), eos_id=eos_id if is_masked else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return module.to(device).eval()


def score_documents(checkpoint: Checkpoint, text: MeasuredText, windows: Windows) -> DocumentScores:
    """What each document of a text gives."""
    module = scoring_module(checkpoint, text.eos_id)
    totals = document_totals(module, text, windows)
    return DocumentScores(
        nats=totals.nats,
        targets=totals.targets,
        text_bytes=text.text_bytes,
        sources=text.sources,
        source_of=text.source_of,
    )


def measure(run: OpenRun) -> Measured:
    """The figures of a text, of each of its sources, and the scores of its documents."""
    how = Bootstrap()
    text = run.text
    checkpoint = run.opened.checkpoint
    documents = score_documents(checkpoint, text, run.windows)
    whole = score_of(documents, how)
    sources = {text.sources[0]: whole}
    if len(text.sources) > 1:
        for index, name in enumerate(text.sources):
            sources[name] = score_of(documents.of_source(index), how)
    other_place = run.other_place
    result = EvaluationResult(
        step=checkpoint.step,
        fingerprint=text.fingerprint,
        whole_split=whole,
        sources=sources,
        data_dir=None if other_place is None else other_place.resolve(),
        stride=run.windows.given_stride,
        bootstrap=how,
    )
    return Measured(result=result, documents=documents)


def evaluate(checkpoint: Checkpoint, reader: ShardReader) -> EvaluationResult:
    """The figures of a data set's whole validation split, and of each source, in blocks."""
    run = OpenRun(
        opened=OpenCheckpoint(checkpoint=checkpoint, is_newest=False, run_dir=None),
        text=validation_text(reader),
        other_place=place_of_other_data(checkpoint, reader),
        windows=windows_of(context_of(checkpoint), None),
    )
    return measure(run).result
