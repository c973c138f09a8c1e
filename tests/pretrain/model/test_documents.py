"""Documents within a window: each is computed as if it were alone, and every target still
counts.
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.runs import run_command
from torch import Tensor

from data_prep.shards import ShardReader
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.reader import load_model
from pretrain.config.recipe import ModelRecipe
from pretrain.evaluation.scoring import evaluate
from pretrain.model.activation_checkpointing import apply_activation_checkpointing
from pretrain.model.build import model_config
from pretrain.model.documents import (
    block_mask,
    boolean_mask,
    document_positions,
    hidden_states_by_document,
)
from pretrain.model.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM

EOS = 0
MODES = ["none", "selective", "full"]
windows = st.lists(st.sampled_from([EOS, EOS, *range(1, 8)]), min_size=1, max_size=24)


@cache
def small_model(mode: str = "none") -> TableFreeForCausalLM:
    """Weights large enough that a token which sees too much shows."""
    recipe = ModelRecipe(
        vocab_size=12, d_model=16, num_layers=2, num_heads=2, seq_len=32, input_embedding="learned"
    )  # fmt: skip
    model = TableFreeForCausalLM(model_config(recipe))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(
                1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator
            )
    apply_activation_checkpointing(model, mode, 1)
    return model


def pieces(ids: list[int]) -> list[list[int]]:
    """The parts of documents that a window holds; an end belongs to the document it ends."""
    found: list[list[int]] = [[]]
    for token in ids:
        found[-1].append(token)
        if token == EOS:
            found.append([])
    return [piece for piece in found if piece]


@given(ids=windows)
@example(ids=[EOS])
@example(ids=[EOS, EOS, EOS])
@example(ids=[EOS, 1, 2, EOS])
@example(ids=[1, 2, 3])
def test_positions_restart_after_each_end_of_document(ids: list[int]) -> None:
    expected = [position for piece in pieces(ids) for position in range(len(piece))]
    assert document_positions(torch.tensor([ids]), EOS).tolist() == [expected]


@given(ids=windows)
@example(ids=[EOS, 1, 2, EOS, EOS, 3])
def test_a_query_sees_the_keys_of_its_own_document_up_to_itself(ids: list[int]) -> None:
    owner = [number for number, piece in enumerate(pieces(ids)) for _ in piece]
    expected = [[owner[q] == owner[k] and k <= q for k in range(len(ids))] for q in range(len(ids))]
    assert boolean_mask(document_positions(torch.tensor([ids]), EOS)).tolist() == [[expected]]


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(ids=windows)
@example(ids=[EOS, 1, 2, EOS])
@example(ids=[5, EOS, EOS, EOS, 6, 7])
@example(ids=[1, 2, 3])
def test_hidden_states_of_a_window_are_those_of_its_documents_alone(
    mode: str, ids: list[int]
) -> None:
    model = small_model(mode).model
    window = hidden_states_by_document(model, torch.tensor([ids]), EOS)[0]
    alone = [model.hidden_states(torch.tensor([piece]))[0] for piece in pieces(ids)]
    torch.testing.assert_close(window, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_windows_of_a_batch_have_boundaries_of_their_own() -> None:
    rows = [[1, 2, EOS, 3, 4, 5], [1, EOS, EOS, 3, 4, 5], [1, 2, 3, 4, 5, 6]]
    together = hidden_states_by_document(small_model().model, torch.tensor(rows), EOS)
    for row, hidden in zip(rows, together, strict=True):
        torch.testing.assert_close(
            hidden, hidden_states_by_document(small_model().model, torch.tensor([row]), EOS)[0]
        )


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_flows_from_one_document_into_another(mode: str) -> None:
    model = small_model(mode).model
    # each of ids of its own, so that a row of the table tells whose it is
    documents = [[1, 2, 3], [4, 5], [6, 7, 8]]
    ids = torch.tensor([[token for document in documents for token in [*document, EOS]]])
    first = 0
    for document in documents:
        hidden = hidden_states_by_document(model, ids, EOS)[0, first : first + len(document)]
        (grad,) = torch.autograd.grad(hidden.square().sum(), model.input_embedding.weight)
        others = [token for token in range(1, 9) if token not in document]
        assert torch.equal(grad[others], torch.zeros(len(others), 16))
        assert (grad[document] != 0).any(dim=1).all()
        first += len(document) + 1


def module(eos_id: int | None) -> LanguageModelLoss:
    return LanguageModelLoss(small_model(), eos_id=eos_id)


def test_all_targets_count_the_same_with_and_without_masking() -> None:
    ids = torch.tensor([[1, 2, EOS, 3, 4, 5, EOS, EOS, 6], [7, 7, 1, EOS, 2, 3, 4, 5, 6]])
    inputs, targets = ids[:, :-1], ids[:, 1:]
    nats = {eos_id: module(eos_id).nats(inputs, targets) for eos_id in (None, EOS)}
    for eos_id, value in nats.items():
        assert value.shape == targets.shape
        torch.testing.assert_close(module(eos_id)(inputs, targets), value.mean())
    # Up to the first end nothing differs: the target after an end is predicted by that end, which
    # sees its document.
    torch.testing.assert_close(nats[None][0, :3], nats[EOS][0, :3])
    torch.testing.assert_close(nats[None][1, :4], nats[EOS][1, :4])
    assert not torch.allclose(nats[None][0, 3:], nats[EOS][0, 3:], atol=1e-3)


def test_a_window_within_one_document_has_the_same_loss_with_and_without_masking() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, EOS]])
    losses = [module(eos_id)(ids[:, :-1], ids[:, 1:]) for eos_id in (None, EOS)]
    torch.testing.assert_close(losses[0], losses[1])


def ids_with_ends(rows: int, tokens: int, seed: int) -> Tensor:
    """Random windows in which about every 30th token ends a document."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 12, (rows, tokens), generator=generator)
    return ids.masked_fill(torch.rand(rows, tokens, generator=generator) < 1 / 30, EOS)


@torch.no_grad()
def test_flex_attention_sees_what_the_boolean_mask_shows() -> None:
    positions = document_positions(ids_with_ends(2, 256, seed=1), EOS)
    mask, visible = block_mask(positions), boolean_mask(positions)
    ids = ids_with_ends(2, 256, seed=1)
    states = [
        small_model().model.hidden_states(ids, positions, either) for either in (mask, visible)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-5)


def test_flex_attention_skips_the_blocks_that_no_document_spans() -> None:
    ids = torch.ones(1, 512, dtype=torch.int64)
    # two documents of two blocks each: of the 10 causal blocks the second needs none of the first
    ids[0, 255] = EOS
    assert block_mask(document_positions(ids, EOS)).to_dense()[0, 0].tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def nats_of_documents_alone(
    model: TableFreeForCausalLM, inputs: Tensor, targets: Tensor, eos_id: int
) -> float:
    """Each document's part of a window run by itself, the nats of all targets added up."""
    after_ends = ((inputs == eos_id).nonzero().flatten() + 1).tolist()
    parts = zip(inputs.tensor_split(after_ends), targets.tensor_split(after_ends), strict=True)
    logits = [(model(part[None]).logits[0], wanted) for part, wanted in parts if len(part)]
    return sum(F.cross_entropy(scores, wanted, reduction="sum").item() for scores, wanted in logits)


@torch.no_grad()
def test_a_run_trained_with_masking_is_evaluated_with_it(text_run: Path, text_data: Path) -> None:
    reader, checkpoint = ShardReader(text_data), load_for_reading(text_run)
    trained = checkpoint.parameter
    checkpoint.parameter = lambda name: 6 * trained(name)  # type: ignore[method-assign]  # so that masking shows
    plain = evaluate(checkpoint, reader).whole_split
    checkpoint.manifest.recipe["intra_document_masking"] = True
    masked = evaluate(checkpoint, reader).whole_split

    shards = reader.manifest.shards_of("validation")
    stream = torch.from_numpy(
        np.concatenate([reader.tokens(shard) for shard in shards]).astype(np.int64)
    )
    model, eos_id, seq_len = load_model(checkpoint).eval(), reader.manifest.eos_id, 32
    windows = [stream[start : start + seq_len + 1] for start in range(0, len(stream) - 1, seq_len)]
    nats = sum(nats_of_documents_alone(model, ids[:-1], ids[1:], eos_id) for ids in windows)
    assert masked.targets == plain.targets == len(stream) - 1
    assert masked.loss == pytest.approx(nats / masked.targets, rel=1e-6)
    # ten times the tolerance above
    assert abs(masked.loss - plain.loss) > 1e-5 * plain.loss


def test_the_benchmark_runs() -> None:
    result = run_command(sys.executable, "tests/benchmarks/document_masking.py", "--quick")
    assert result.returncode == 0, result.stderr
    assert "| intra_document_masking |" in result.stdout
