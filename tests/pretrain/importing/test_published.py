"""Models with the published ones' config keys, beside a forward pass from their description: a
code of n_embd bits lifted to the width, names and layouts of their own.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import UserError
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.reader import load_model
from pretrain.import_hf import main
from pretrain.importing.names import PUBLISHED_NAMES

V, D, LAYERS, HEADS, K = 512, 48, 2, 4, 16
CONFIG: dict[str, Any] = {
    "model_type": "model_bits", "vocab_size": V, "block_size": 32, "n_embd": K, "d_model": D,
    "n_layer": LAYERS, "n_head": HEADS, "pad_id": 511, "dropout": 0.1,
}  # fmt: skip
Weights = dict[str, Tensor]


def some_weights(*, attention_bias: bool = False) -> Weights:
    """Every tensor random, under the names that the project's table begins with."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        is_norm = shape == (D,)
        return torch.randn(shape, generator=generator) * 0.3 + (0.5 if is_norm else 0.0)

    weights = {"ln_f.weight": random(D), "ln_f.bias": random(D), "lm_head.weight": random(V, D)}
    for i in range(LAYERS):
        at = f"blocks.{i}"
        shapes = {
            "ln1.weight": (D,), "ln1.bias": (D,), "ln2.weight": (D,), "ln2.bias": (D,),
            "attn.qkv.weight": (3 * D, D), "attn.proj.weight": (D, D),
            "mlp.0.weight": (4 * D, D), "mlp.0.bias": (4 * D,),
            "mlp.2.weight": (D, 4 * D), "mlp.2.bias": (D,),
        }  # fmt: skip
        if attention_bias:
            shapes |= {"attn.qkv.bias": (3 * D,), "attn.proj.bias": (D,)}
        weights |= {f"{at}.{name}": random(*shape) for name, shape in shapes.items()}
    weights["lm_head.bias"] = torch.zeros(V)
    return weights


def turned(x: Tensor, rotary: str) -> Tensor:
    """Rotary positions, (T, H, C), as complex numbers."""
    tokens, _, channels = x.shape
    frequency = 10_000.0 ** (-torch.arange(channels // 2) / (channels // 2))
    turn = torch.polar(torch.ones(()), torch.arange(tokens)[:, None] * frequency)[:, None]
    if rotary == "pairs":
        number = torch.complex(x[..., 0::2], x[..., 1::2]) * turn
        return torch.stack([number.real, number.imag], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    number = torch.complex(first, second) * turn
    return torch.cat([number.real, number.imag], dim=-1)


def logits_of(w: Weights, ids: Tensor, lift: str, rotary: str) -> Tensor:
    """The decoder of the description, one sequence."""
    bits = (ids[:, None] >> torch.arange(K) & 1).float()
    repeats = D // K
    x = bits.repeat(1, repeats) if lift == "repeat" else bits.repeat_interleave(repeats, dim=1)
    for i in range(LAYERS):
        at = f"blocks.{i}"
        normed = F.layer_norm(x, (D,), w[f"{at}.ln1.weight"], w[f"{at}.ln1.bias"])
        qkv = F.linear(normed, w[f"{at}.attn.qkv.weight"], w.get(f"{at}.attn.qkv.bias"))
        q, k, v = (part.view(len(ids), HEADS, -1) for part in qkv.chunk(3, dim=-1))
        q, k = turned(q, rotary), turned(k, rotary)
        heads = (part.transpose(0, 1) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        joined = attended.transpose(0, 1).reshape(len(ids), D)
        x = x + F.linear(joined, w[f"{at}.attn.proj.weight"], w.get(f"{at}.attn.proj.bias"))
        normed = F.layer_norm(x, (D,), w[f"{at}.ln2.weight"], w[f"{at}.ln2.bias"])
        up = F.gelu(F.linear(normed, w[f"{at}.mlp.0.weight"], w[f"{at}.mlp.0.bias"]))
        x = x + F.linear(up, w[f"{at}.mlp.2.weight"], w[f"{at}.mlp.2.bias"])
    return F.linear(F.layer_norm(x, (D,), w["ln_f.weight"], w["ln_f.bias"]), w["lm_head.weight"])


def published(directory: Path, weights: Weights, tokenizer: Path, **changes: Any) -> Path:
    """A directory as such a model is published in."""
    shutil.copytree(tokenizer, directory)
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return directory


def names_file(path: Path, renames: dict[str, Any], **layout: str) -> Path:
    """The project's table with another layout, and other names."""
    table = yaml.safe_load(PUBLISHED_NAMES.read_text())
    table["layout"] |= layout
    table["names"] |= renames
    path.write_text(yaml.safe_dump(table))
    return path


def check(directory: Path, run_dir: Path, expected: Tensor, ids: Tensor, *more: str) -> None:
    main(["--from", str(directory), "--run-dir", str(run_dir), *more])
    model = load_model(load_for_reading(run_dir)).eval()
    assert model.config.input_embedding == "binary_code"
    assert model.config.code_bits == K
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=1e-4, atol=1e-4)
    assert (expected - expected[0]).std() > 0.3  # tokens matter


IDS = torch.randint(0, V, (24,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rotary", ["halves", "pairs"])
@pytest.mark.parametrize("lift", ["repeat", "repeat_interleave"])
@pytest.mark.parametrize("with_table", [False, True])
def test_logits_are_those_of_the_description(
    lift: str, rotary: str, with_table: bool, text_data: Path, tmp_path: Path
) -> None:
    weights = some_weights(attention_bias=rotary == "pairs")
    expected = logits_of(weights, IDS, lift, rotary)
    others = {("repeat", "pairs"), ("repeat", "halves"), ("repeat_interleave", "halves")}
    for other in others - {(lift, rotary)}:
        assert not torch.allclose(logits_of(weights, IDS, *other), expected, atol=0.1)
    if with_table:
        weights["tok_emb.weight"] = (torch.arange(V)[:, None] >> torch.arange(K) & 1).float()
    directory = published(tmp_path / "published", weights, text_data / "tokenizer")
    table = names_file(tmp_path / "names.yaml", {}, lift=lift, rotary=rotary)
    check(directory, tmp_path / "run", expected, IDS, "--names", str(table))
    if (lift, rotary) == ("repeat", "halves"):  # what goes without saying
        check(directory, tmp_path / "again", expected, IDS)


def test_a_table_of_the_whole_width_tells_by_itself_how_it_was_lifted(
    text_data: Path, tmp_path: Path
) -> None:
    weights = some_weights()
    expected = logits_of(weights, IDS, "repeat_interleave", "halves")
    bits = (torch.arange(V)[:, None] >> torch.arange(K) & 1).float()
    weights["tok_emb.weight"] = bits.repeat_interleave(D // K, dim=1)
    directory = published(tmp_path / "published", weights, text_data / "tokenizer", n_embd=D)
    check(directory, tmp_path / "run", expected, IDS)


def test_names_of_its_own_come_from_a_file(text_data: Path, tmp_path: Path) -> None:
    weights = some_weights()
    expected = logits_of(weights, IDS, "repeat", "halves")
    renamed = {}
    for name, value in weights.items():
        if name.endswith("attn.qkv.weight"):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"att.{part}")] = rows.contiguous()
        else:
            renamed[name.replace("attn.proj", "att.out")] = value
    directory = published(tmp_path / "published", renamed, text_data / "tokenizer")
    with pytest.raises(UserError, match=r"no tensor is layers\.0\.attention\.query_key_value"):
        main(["--from", str(directory), "--run-dir", str(tmp_path / "run")])
    at = "blocks.{layer}.att"
    renames = {
        "layers.{layer}.attention.query_key_value.weight":
            f"{at}.q.weight + {at}.k.weight + {at}.v.weight",
        "layers.{layer}.attention.output.weight": f"{at}.out.weight",
    }  # fmt: skip
    table = names_file(tmp_path / "names.yaml", renames)
    check(directory, tmp_path / "run", expected, IDS, "--names", str(table))


def put(name: str, value: Tensor) -> Any:
    def change(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        save_file(weights | {name: value}, directory / "model.safetensors")

    return change


def config(**changes: Any) -> Any:
    def change(directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps(CONFIG | changes))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("lm_head.bias", torch.ones(V)), "lm_head.bias is a bias of the output projection"),
        (put("blocks.0.gate.weight", torch.ones(3)), "blocks.0.gate.weight, of shape [3]: no"),
        (
            put("ln_f.weight", torch.ones(D + 1)),
            "ln_f.weight has shape [49], as final_norm.weight or a part of it",
        ),
        (put("wte.weight", torch.rand(V, K)), "wte.weight is no code of 0 and 1"),
        (put("head.weight", torch.ones(V, D)), "are both output_projection.weight"),
        (config(n_embd=9), "n_embd 9 does not fill d_model 48 evenly"),
        (config(n_embd=8), "a code of n_embd 8 bits tells fewer than vocab_size 512 ids apart"),
        (config(n_embd=D), "no tensor is input_embedding.weight, and n_embd 48 is the whole width"),
        (config(n_head=5), "is no even number of channels for each of 5 heads"),
        (config(pad_id=512), "pad_id 512 is no id below vocab_size 512"),
        (config(block_size="32"), "block_size '32' is no positive whole number"),
        (config(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (config(rope_theta=5e5), "rope_theta 500000.0 is unknown here and by its name changes"),
    ],
)
def test_what_contradicts_itself_or_is_not_known_is_named_and_refused(
    change: Any, says: str, text_data: Path, tmp_path: Path
) -> None:
    directory = published(tmp_path / "published", some_weights(), text_data / "tokenizer")
    change(directory)
    with pytest.raises(UserError) as caught:
        main(["--from", str(directory), "--run-dir", str(tmp_path / "run")])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "no table of names"),
        ("{names: {}, layuot: {}}", "unknown key layuot; did you mean layout?"),
        ("{names: {}, layout: {lift: tile}}", "layout.lift: got 'tile'; expected 'repeat'"),
        ("{names: {}, layout: {order: x}}", "unknown key layout.order"),
        ("{names: {final_norm.weight: 3}}", "names.final_norm.weight"),
        ("{names: {final_nrm.bias: x}}", "no parameter; did you mean final_norm.bias?"),
    ],
)
def test_a_file_that_is_no_table_of_names_is_refused(
    content: str, says: str, text_data: Path, tmp_path: Path
) -> None:
    directory = published(tmp_path / "published", some_weights(), text_data / "tokenizer")
    file = tmp_path / "names.yaml"
    file.write_text(content)
    flags = ["--from", str(directory), "--run-dir", str(tmp_path / "run"), "--names", str(file)]
    with pytest.raises(UserError) as caught:
        main(flags)
    assert says in str(caught.value)
