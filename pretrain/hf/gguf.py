"""A run as one GGUF file, for llama.cpp and the engines built on it.

It is the stock GPT-NeoX form under GGUF's names.

The format's keys are those of the `gguf` package, which writes the file. llama.cpp's own converter
knows tokenizers by a digest over their merges, so none of ours; its engines know pre-tokenizers by
name, and one of these is that of a byte-level tokenizer. Tokenizers of other kinds would get other
ids there, so they are refused.

The engines' GELU is the approximation by tanh, which moves logits by 0.004 or so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import GPTNeoXConfig

from data_prep.errors import UserError, explained, install_advice
from pretrain.hf.names import TO_GGUF, renamed
from pretrain.modeling_tablefree import ROTARY_BASE

if TYPE_CHECKING:
    import gguf

BLOCK = 32  # values of a row that share a scale in q8_0
# What llama.cpp calls GPT-2's expression for words. Of its names for it this one's tokenizers keep
# the spaces before punctuation when a whole text is decoded; "gpt-2" takes them away.
PRE_TOKENIZER = "trillion"
OTHER_FORM = "export another form (--architecture gpt_neox)"
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file holds of a tokenizer."""

    definition: Json  # tokenizer.json
    tokenizer: Tokenizer
    special_ids: dict[str, int]  # bos_token_id, eos_token_id, pad_token_id
    chat_template: str | None = None


def require_gguf() -> None:
    """Raise UserError where the package that writes the files is missing."""
    with explained(
        ImportError,
        "--architecture gguf: the package that writes the files is missing",
        install_advice("gguf"),
    ):
        import gguf  # noqa: F401


def write_gguf(
    path: Path,
    weights: dict[str, Tensor],
    config: GPTNeoXConfig,
    vocabulary: Vocabulary,
    dtype: str,
) -> None:
    """Write a stock GPT-NeoX, its weights in fp32, as a GGUF file of a precision of DTYPES.

    Norms and biases stay in f32. The file is not flushed to the disk. Raises UserError for a width
    that q8_0 can't cut into blocks, for weights beyond f16, and for a tokenizer that the engines
    would read otherwise.
    """
    import gguf

    problem = why_read_otherwise(vocabulary.definition, vocabulary.tokenizer)
    if problem is not None:
        raise UserError(
            f"--architecture gguf: the engines would give other ids ({problem}); {OTHER_FORM}"
        )
    if dtype == "q8_0" and config.hidden_size % BLOCK:
        raise UserError(
            f"--dtype q8_0: width {config.hidden_size} is no multiple of {BLOCK}, which share a "
            "scale; use f16"
        )
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    writer = gguf.GGUFWriter(path, "gptneox")
    writer.add_name("tablefree")
    add_architecture(writer, config, kind)
    add_vocabulary(writer, vocabulary, config.vocab_size)
    for name, tensor in weights.items():
        add_weight(writer, name, tensor, kind, config.num_attention_heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_weight(
    writer: "gguf.GGUFWriter",
    name: str,
    tensor: Tensor,
    kind: "gguf.GGMLQuantizationType",
    heads: int,
) -> None:
    """One parameter of a stock GPT-NeoX; vectors, norms and biases that is, in f32."""
    import gguf

    if ".query_key_value." in name:
        tensor = by_kind(tensor, heads)
    own_kind = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
    packed = stored(tensor, own_kind, name)
    writer.add_tensor(renamed(name, TO_GGUF), packed, raw_dtype=own_kind)


def add_architecture(
    writer: "gguf.GGUFWriter", config: GPTNeoXConfig, kind: "gguf.GGMLQuantizationType"
) -> None:
    """What an engine builds: the decoder's shape, and its sequential residual.

    A parallel one, which engines take unless told, gives other text.
    """
    import gguf

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(ROTARY_BASE)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind.name]])
    if kind.name == "Q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_vocabulary(writer: "gguf.GGUFWriter", vocabulary: Vocabulary, vocab_size: int) -> None:
    """Add tokens, their types, and merges.

    Text gives the data's ids, and special tokens only where an engine is told so.
    """
    import gguf

    tokens = [f"[PAD{id_}]" for id_ in range(vocab_size)]  # ids of the model that no token has
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, id_ in vocabulary.tokenizer.get_vocab(with_added_tokens=False).items():
        tokens[id_] = token
        types[id_] = int(gguf.TokenType.NORMAL)
    for id_, added in vocabulary.tokenizer.get_added_tokens_decoder().items():
        kind = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
        tokens[id_] = added.content
        types[id_] = int(kind)
    ids = vocabulary.special_ids
    types[ids["eos_token_id"]] = int(gguf.TokenType.CONTROL)  # engines stop there
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges_of(vocabulary.definition)])
    writer.add_bos_token_id(ids["bos_token_id"])
    writer.add_eos_token_id(ids["eos_token_id"])
    writer.add_pad_token_id(ids["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def merges_of(definition: Json) -> Iterator[tuple[str, str]]:
    """The pairs that a BPE merges, best first; older files write each as one string."""
    for merge in definition["model"]["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        left, right = pair
        yield left, right


def why_read_otherwise(definition: Json, reference: Tokenizer) -> str | None:
    """What in a tokenizer llama.cpp would read otherwise than `tokenizers`.

    None for a plain byte-level BPE.
    """
    model = definition["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        return "its model is no plain BPE"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its model marks the inside or the end of words"
    if definition.get("normalizer"):
        return f"a normaliser, {definition['normalizer'].get('type')}"
    steps = definition.get("pre_tokenizer") or {}
    is_byte_level = steps.get("type") == "ByteLevel"
    splits_words = steps.get("use_regex", True)
    if not is_byte_level or not splits_words or steps.get("add_prefix_space"):
        return "its pre-tokenizer is not GPT-2's, without a space before the text"
    decoder = definition.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return "its decoder is not byte-level"
    vocabulary = reference.get_vocab(with_added_tokens=False)
    if any(token not in vocabulary for token in ByteLevel.alphabet()):
        return "it has no token for some bytes"
    for token in reference.get_added_tokens_decoder().values():
        if not token.special and (token.lstrip or token.rstrip or token.single_word):
            return f"the added token {token.content!r} takes what is beside it into account"
    return None


def by_kind(tensor: Tensor, heads: int) -> Tensor:
    """Rows of query_key_value from each head's (q, k, v) to all queries, all keys, all values.

    The shape is (3 D, D), or (3 D,) of a bias.
    """
    grouped = tensor.view(heads, 3, -1, *tensor.shape[1:])
    return grouped.transpose(0, 1).reshape(tensor.shape)


def stored(tensor: Tensor, kind: "gguf.GGMLQuantizationType", name: str) -> npt.NDArray[Any]:
    """A tensor's bytes in the file. Raises UserError for values that f16 has not."""
    from gguf.quants import quantize

    if kind.name == "F16" and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(
            f"--dtype f16: {name} has values beyond 65,504, the largest of f16; use f32"
        )
    packed: npt.NDArray[Any] = quantize(np.ascontiguousarray(tensor.numpy()), kind)
    return packed
