"""torch.compile of the blocks: the same figures from one graph, and no second look at it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.errors import UserError
from pretrain.config.recipe import ModelRecipe
from pretrain.model.activation_checkpointing import apply_activation_checkpointing
from pretrain.model.build import model_config
from pretrain.model.compilation import apply_compile, check_compiler, compiled_graphs
from pretrain.model.documents import block_mask, document_positions
from pretrain.model.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM, initialise_parameters, run_block

EOS, SEQ_LEN, STEPS = 0, 16, 3
NUM_LAYERS = 3


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def build(
    mode: str, every_n_layers: int = 1, *, compiled: bool, eos_id: int | None
) -> LanguageModelLoss:
    recipe = ModelRecipe(
        vocab_size=64,
        d_model=24,
        num_layers=NUM_LAYERS,
        num_heads=2,
        seq_len=SEQ_LEN,
        input_embedding="learned",
    )
    model = TableFreeForCausalLM(model_config(recipe))
    initialise_parameters(model, 1)
    apply_activation_checkpointing(model, mode, every_n_layers)
    if compiled:
        apply_compile(model)
    return LanguageModelLoss(model, eos_id=eos_id)


def batch(step: int, rows: int = 3, tokens: int = SEQ_LEN) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 64, (rows, tokens + 1), generator=torch.Generator().manual_seed(step))
    ids[0, step] = EOS
    return ids[:, :-1], ids[:, 1:]


def train(module: LanguageModelLoss, steps: int = STEPS) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradients of a few steps of plain gradient descent."""
    losses, gradients = [], []
    for step in range(steps):
        loss = module(*batch(step))
        module.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter in module.parameters():
                assert parameter.grad is not None
                gradients.append(parameter.grad.clone())
                parameter -= 0.1 * parameter.grad
    return losses, gradients


@pytest.mark.parametrize(
    ("mode", "every_n_layers", "eos_id", "graphs"),
    [("none", 1, EOS, 1), ("full", 2, None, 2), ("selective", 2, EOS, 2)],
)
def test_compiled_blocks_share_a_graph_that_gives_the_eager_figures_and_the_same_bits_each_time(
    mode: str, every_n_layers: int, eos_id: int | None, graphs: int
) -> None:
    before = compiled_graphs()
    compiled = build(mode, every_n_layers, compiled=True, eos_id=eos_id)
    mine = train(compiled)
    # for all blocks and steps; two where only some blocks recompute
    assert compiled_graphs() - before == graphs
    compiled.nats(*batch(7, rows=5, tokens=9))
    compiled.model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=3, pad_token_id=0)
    assert compiled_graphs() - before == graphs, "an evaluation of another shape compiled something"

    eager = train(build(mode, every_n_layers, compiled=False, eos_id=eos_id))
    again = train(build(mode, every_n_layers, compiled=True, eos_id=eos_id))
    for values, reference, repeated in zip(mine, eager, again, strict=True):
        torch.testing.assert_close(values, reference, rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, values, repeated))


def test_every_recompilation_is_counted() -> None:
    square = torch.compile(torch.square, dynamic=False, backend="eager")
    before = compiled_graphs()
    for rows, graphs in ((2, 1), (2, 1), (3, 2), (2, 2)):
        square(torch.ones(rows))
        assert compiled_graphs() - before == graphs


@torch.no_grad()
def test_flex_attention_is_part_of_the_block_s_graph_and_new_documents_do_not_recompile_it() -> (
    None
):
    # The CPU has no backward pass of flex_attention, so this runs forward only, and by hand.
    module = build("none", compiled=False, eos_id=EOS)
    model = module.model.model
    before, compiled = (
        compiled_graphs(),
        torch.compile(run_block, dynamic=False, fullgraph=True, backend="eager"),
    )
    model.block_runners = dict.fromkeys(range(NUM_LAYERS), compiled)
    for step in range(3):
        ids, _ = batch(step, tokens=128)
        positions = document_positions(ids, EOS)
        with torch.enable_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(requires_grad=False)
            flex = model.hidden_states(ids, positions, block_mask(positions))
        torch.testing.assert_close(flex, module.hidden_states(ids), rtol=1e-5, atol=1e-5)
    assert compiled_graphs() - before == 1


def test_compiling_changes_no_parameter_s_name_and_no_saved_model(tmp_path: Path) -> None:
    plain, compiled = (build("none", compiled=c, eos_id=None).model for c in (False, True))
    assert [name for name, _ in compiled.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    for name, model in (("plain", plain), ("compiled", compiled)):
        model.save_pretrained(tmp_path / name)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "compiled" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"compile: .*no-such-compiler.*--compile=false"):
        check_compiler("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_on_a_gpu_flex_attention_in_compiled_blocks_gives_the_figures_of_the_boolean_mask(
    mode: str,
) -> None:
    recipe = ModelRecipe(
        vocab_size=64,
        d_model=64,
        num_layers=2,
        num_heads=2,
        seq_len=256,
        input_embedding="learned",
        code_bits=16,
    )
    losses, gradients = [], []
    for compiled in (False, True):
        model = TableFreeForCausalLM(model_config(recipe)).cuda()
        initialise_parameters(model, 1)
        apply_activation_checkpointing(model, mode, 1)
        if compiled:
            apply_compile(model)
        before, module = compiled_graphs(), LanguageModelLoss(model, eos_id=EOS)
        for step in range(STEPS):
            module.zero_grad()
            loss = module(*(ids.cuda() for ids in batch(step, tokens=256)))
            loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert compiled_graphs() - before == int(compiled)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-4)
