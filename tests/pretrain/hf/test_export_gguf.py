"""GGUF exports, asked of a prebuilt llama.cpp: the data's ids, the model's logits, and the text
that it would write.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.kinds_of_tokenizers import KINDS, Kind, write_tokenizer
from support.prep_helpers import NASTY_TEXTS, speeches
from support.runs import run_command
from support.untrained_runs import save_untrained_run
from tokenizers import Tokenizer

from data_prep import train_tokenizer
from data_prep.errors import UserError
from data_prep.files import digest_file
from data_prep.shards import ShardReader, read_tokenizer
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.reader import load_model
from pretrain.export_hf import main
from pretrain.hf.architectures import gpt_neox_parts
from pretrain.hf.export import special_token_ids
from pretrain.hf.gguf import Vocabulary, write_gguf
from pretrain.hf.ids import HARD_TEXTS, hard_texts
from pretrain.hf.marker import read_marker
from pretrain.hf.names import gguf_name
from pretrain.hf.tokenizer import as_exported
from pretrain.modeling_tablefree import (
    INPUT_EMBEDDINGS,
    TableFreeConfig,
    TableFreeForCausalLM,
    initialise_parameters,
    name_in_checkpoints,
)

llama = pytest.importorskip(
    "cyllama.llama.llama_cpp", reason="cyllama, a prebuilt llama.cpp, is not installed"
)
llama.disable_logging()

# Seen: 0.004 in f32, by the tanh of the engine's GELU; f16 and q8_0 round the weights
LARGEST_DIFFERENCE = {"f32": 0.01, "f16": 0.02, "q8_0": 0.2}
# Kinds of tokenizers that the engines read otherwise.
OTHERWISE = {
    "digits", "digits of gpt2", "expression of gpt4", "space before", "space before, not told",
    "no expression", "punctuation", "scripts", "nfc", "nfkc", "lower case",
    "lower case, of a class", "replaced words", "stripped", "metaspace", "llama", "llama, legacy",
    "unigram", "t5", "wordpiece", "bert", "words", "added word with flags",
}  # fmt: skip


class Model(llama.LlamaModel):  # type: ignore[misc, name-defined]
    """A GGUF file, opened. (The context of cyllama 0.2.18 asks it for its size under a name that
    it does not have.)
    """

    @property
    def n_vocab(self) -> int:
        size: int = self.get_vocab().n_vocab
        return size


def open_file(path: Path) -> Model:
    parameters = llama.LlamaModelParams()
    parameters.n_gpu_layers = 0
    return Model(str(path), parameters, verbose=False)


def logits_of(model: Model, ids: Sequence[int]) -> np.ndarray:
    """What the engine gives after each id, (T, V)."""
    parameters = llama.LlamaContextParams()
    parameters.n_ctx = parameters.n_batch = len(ids)
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama.LlamaContext(model, parameters, verbose=False)
    batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for position, id_ in enumerate(ids):
        batch.add(id_, position, [0], True)
    assert context.decode(batch) == 0
    return np.array([context.get_logits_ith(position) for position in range(len(ids))])


def ids_of(model: Model, text: str, *, parse_special: bool = False) -> list[int]:
    return list(model.get_vocab().tokenize(text, False, parse_special))


def text_of(model: Model, ids: list[int]) -> str:
    text: str = model.get_vocab().detokenize(ids, 8 * len(ids) + 64, False, True)
    return text


def nats(logits: np.ndarray, targets: Sequence[int]) -> float:
    """The mean loss of targets."""
    return float(
        torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.tensor(targets))
    )


def export(run_dir: Path, output: Path, *more: str) -> Path:
    """The one file of a GGUF export."""
    main(["--run-dir", str(run_dir), "--output-dir", str(output), "--architecture", "gguf", *more])
    (file,) = output.glob("*.gguf")
    return file


def validation_ids(data: Path, number: int) -> list[int]:
    reader = ShardReader(data)
    ids: list[int] = reader.tokens(reader.manifest.shards_of("validation")[0])[:number].tolist()
    return ids


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_an_engine_gives_the_logits_of_the_training_class(
    dtype: str, input_embedding: str, text_run: Path, tmp_path: Path
) -> None:
    save_untrained_run(tmp_path / "run", text_run / "tokenizer", input_embedding, d_model=64)
    trained = load_model(load_for_reading(tmp_path / "run")).eval()
    file = export(tmp_path / "run", tmp_path / "export", "--dtype", dtype)
    assert file.name == f"model-{dtype.upper()}.gguf"
    ids = torch.randint(0, 512, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = trained(torch.tensor([ids])).logits[0].numpy()
    got = logits_of(open_file(file), ids)
    assert expected.std() > 0.1
    assert np.abs(got - expected).max() < LARGEST_DIFFERENCE[dtype]


def test_an_engine_scores_and_continues_a_text_as_the_training_class_does(
    text_run: Path, text_data: Path, tmp_path: Path
) -> None:
    model = open_file(export(text_run, tmp_path / "export"))
    trained = load_model(load_for_reading(text_run)).eval()
    ids = validation_ids(text_data, 33)
    with torch.no_grad():
        expected = trained(torch.tensor([ids[:-1]])).logits[0].numpy()
    got = logits_of(model, ids[:-1])
    assert (got.argmax(-1) == expected.argmax(-1)).all()
    assert math.isclose(nats(got, ids[1:]), nats(expected, ids[1:]), rel_tol=1e-4)
    greedy = ids[:8]
    for _ in range(16):
        greedy.append(int(logits_of(model, greedy)[-1].argmax()))
    prompt = torch.tensor([ids[:8]])
    continued = trained.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
    )
    assert continued[0].tolist() == greedy


def test_an_engine_gives_the_ids_of_the_data(
    text_run: Path, text_data: Path, tmp_path: Path
) -> None:
    model = open_file(export(text_run, tmp_path / "export"))
    reference = Tokenizer.from_file(str(text_data / "tokenizer" / "tokenizer.json"))
    reference.encode_special_tokens = True
    one_by_one = [chr(point) for point in range(0x20000) if not 0xD800 <= point <= 0xDFFF]
    texts = [
        *hard_texts(reference),
        *NASTY_TEXTS,
        *speeches(3, 50_000),
        *(f"a{character}b {character}{character}1" for character in one_by_one[::7]),
        *("".join(one_by_one[first : first + 500]) for first in range(0, len(one_by_one), 500)),
    ]
    for text in texts:
        assert ids_of(model, text) == reference.encode(text).ids, text[:60]
    assert ids_of(model, "a<|endoftext|>", parse_special=True)[-1] == model.get_vocab().token_eos()
    assert not model.get_vocab().get_add_bos()
    assert not model.get_vocab().get_add_eos()


@pytest.mark.parametrize("text", [*HARD_TEXTS, speeches(1)[0]])
def test_an_engine_writes_the_text_that_ids_stand_for(
    text: str, text_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Spaces before punctuation included, which engines take away after the pre-tokenizer called
    gpt-2.
    """
    model = open_file(export(text_run, tmp_path_factory.mktemp("export")))
    text = f".{text}"  # cyllama strips the beginning
    assert text_of(model, ids_of(model, text)) == text


def small_model(vocab_size: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Weights and configuration of the stock form, of any vocabulary."""
    config = TableFreeConfig(
        vocab_size=vocab_size, d_model=32, num_layers=1, num_heads=2, seq_len=64, code_bits=16
    )
    model = TableFreeForCausalLM(config)
    initialise_parameters(model, 1)
    masters = {
        name_in_checkpoints(name): tensor.detach() for name, tensor in model.named_parameters()
    }
    return gpt_neox_parts(masters, config)


def write_with_tokenizer(directory: Path, output: Path, vocab_size: int | None = None) -> Tokenizer:
    """A GGUF file of a small model with a tokenizer; returns the tokenizer as the data has it."""
    tokenizer = as_exported(read_tokenizer(directory), directory, 64)
    weights, config = small_model(vocab_size or tokenizer.reference.get_vocab_size())
    vocabulary = Vocabulary(
        definition=json.loads(tokenizer.files["tokenizer.json"]),
        tokenizer=tokenizer.reference,
        special_ids=special_token_ids(tokenizer.roles, 0),
        chat_template=tokenizer.chat_template,
    )
    write_gguf(output, weights, config, vocabulary, "f32")
    return tokenizer.reference


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_are_read_as_in_the_data_or_refused(kind: str, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "tokenizer", KINDS[kind], speeches(3))
    if kind in OTHERWISE:
        with pytest.raises(
            UserError, match=r"engines would give other ids \(.+\); export another form"
        ):
            write_with_tokenizer(source, tmp_path / "a.gguf")
        assert not (tmp_path / "a.gguf").exists()
        return
    reference = write_with_tokenizer(source, tmp_path / "a.gguf")
    model = open_file(tmp_path / "a.gguf")
    for text in [*hard_texts(reference), *NASTY_TEXTS, *speeches(4)[3:]]:
        assert ids_of(model, text) == reference.encode(text).ids, text[:60]


def test_a_tokenizer_like_the_paper_s_is_read_as_in_the_data(tmp_path: Path) -> None:
    lines = tmp_path / "speeches.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches(10)))
    flags = ["--algorithm", "char_ngram", "--vocab-size", "65536", "--source", str(lines)]
    train_tokenizer.main([*flags, "--output-dir", str(tmp_path / "tokenizer")])
    reference = write_with_tokenizer(tmp_path / "tokenizer", tmp_path / "a.gguf")
    model = open_file(tmp_path / "a.gguf")
    for text in [*HARD_TEXTS, *NASTY_TEXTS, *speeches(4)[3:]]:
        assert ids_of(model, text) == reference.encode(text).ids, text[:60]


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "named"])
def test_a_chat_template_comes_along(place: str, tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    told = {
        "tokenizer_config.json": template,
        "named": [{"name": "default", "template": template}],
    }.get(place)
    config = {} if told is None else {"chat_template": told}
    kind = Kind(config=config, files={} if told else {"chat_template.jinja": template})
    source = write_tokenizer(tmp_path / "tokenizer", kind, speeches(3))
    write_with_tokenizer(source, tmp_path / "a.gguf")
    assert open_file(tmp_path / "a.gguf").get_default_chat_template() == template


def test_ids_of_the_model_that_no_token_has_are_unused(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "tokenizer", KINDS["plain"], speeches(3))
    reference = write_with_tokenizer(source, tmp_path / "a.gguf", vocab_size=1000)
    vocabulary = open_file(tmp_path / "a.gguf").get_vocab()
    assert vocabulary.n_vocab == 1000
    assert vocabulary.get_text(reference.get_vocab_size()) == f"[PAD{reference.get_vocab_size()}]"


def test_a_gguf_export_replaces_and_is_replaced_as_the_others_are(
    text_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "export"
    first = export(text_run, output).read_bytes()
    assert export(text_run, output).read_bytes() == first  # bit for bit
    assert export(text_run, output, "--dtype", "f16").name == gguf_name("f16")
    marker = read_marker(output)
    assert marker is not None
    assert (marker.architecture, marker.dtype) == ("gguf", "f16")
    assert marker.files == {
        name: digest_file(output / name) for name in ("README.md", gguf_name("f16"))
    }
    main(["--run-dir", str(text_run), "--output-dir", str(output)])
    assert not list(output.glob("*.gguf"))


def test_the_card_s_example_runs_word_for_word(text_run: Path, tmp_path: Path) -> None:
    card = (export(text_run, tmp_path / "export").parent / "README.md").read_text(encoding="utf-8")
    assert "library_name: gguf" in card
    assert "split_special_tokens" not in card
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert example
    result = run_command(
        sys.executable, "-c", example[1], cwd=tmp_path / "export", CUDA_VISIBLE_DEVICES=""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The state of the Union ")
    assert len(result.stdout) > 30


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["gguf", "--dtype", "q8_0"],
            "--dtype q8_0: width 48 is no multiple of 32, which share a scale; use f16",
        ),
        (
            ["gguf", "--dtype", "float32"],
            "--dtype float32: --architecture gguf takes f32 or f16 or q8_0",
        ),
        (
            ["gpt_neox", "--dtype", "q8_0"],
            "--dtype q8_0: --architecture gpt_neox takes float32 or bfloat16",
        ),
    ],
)
def test_what_can_t_be_is_refused_in_a_line(
    flags: list[str], says: str, text_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        main(
            [
                "--run-dir",
                str(text_run),
                "--output-dir",
                str(tmp_path / "e"),
                "--architecture",
                *flags,
            ]
        )
    assert not list(tmp_path.iterdir())


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "tokenizer", KINDS["plain"], speeches(1))
    tokenizer = as_exported(read_tokenizer(source), source, 64)
    weights, config = small_model(tokenizer.reference.get_vocab_size())
    weights["embed_out.weight"] = weights["embed_out.weight"] + 70_000
    vocabulary = Vocabulary(
        definition=json.loads(tokenizer.files["tokenizer.json"]),
        tokenizer=tokenizer.reference,
        special_ids=special_token_ids(tokenizer.roles, 0),
    )
    with pytest.raises(
        UserError, match=r"embed_out\.weight has values beyond 65,504, the largest of f16; use f32"
    ):
        write_gguf(tmp_path / "a.gguf", weights, config, vocabulary, "f16")


def test_without_the_package_it_says_what_to_install(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # which is how Python marks a module as not to be had
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'tablefree\[gguf\]' \(in a checkout: "):
        export(text_run, tmp_path / "e")
    assert not list(tmp_path.iterdir())
