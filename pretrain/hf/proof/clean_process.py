"""The program of the clean process: it loads an export as a stranger does, and measures it.

    python -I -S clean_process.py        started by pretrain/hf/proof/process.py alone

It imports nothing of this project, and can't: it runs without the paths and hooks of an
installation, takes the folders of packages from who started it, and refuses the project's names in
those. A line on standard input is a request, a JSON object; each is answered by a child forked for
it, so that nothing of one export is there when the next is loaded, and by a line on standard
output. Everything is computed on the CPU by a fixed number of threads: twice on one machine gives
the same bits.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

# How many sums a sketch folds a vocabulary into: more would find smaller changes, and fill the
# certificate.
BUCKETS = 512
SIGN_MULTIPLIER = 2_654_435_761  # of Knuth's multiplicative hashing: 2^32 over the golden ratio
NEW_TOKENS = 16
IDS_AT_ONCE = 4_096  # of the input's sketch
NUMBERS_AT_ONCE = 1 << 20


class Refuser:
    """Makes modules of some names impossible to import."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Asked first for every module."""
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}: this process is a clean one")


def compare_logits(model: Any, ids_path: str, logits_path: str) -> dict[str, float]:
    """Beside the training class: windows of ids, (windows, T + 1), and its logits, (windows, T, V).

    One window at a time, since logits dwarf a model.
    """
    import numpy as np
    import torch

    ids = np.load(ids_path)
    references = np.load(logits_path, mmap_mode="r")
    largest = 0.0
    agreeing = 0
    variance = 0.0
    nats = {"trained": 0.0, "exported": 0.0}
    for row, logits in zip(ids, references, strict=True):
        ids_T = torch.from_numpy(row.astype(np.int64))
        expected_TV = torch.from_numpy(np.array(logits))
        got_TV = model(ids_T[None, :-1]).logits[0].float()
        differences = (got_TV - expected_TV).abs()
        # `max` passes over no NaN, and a NaN is beyond any bound.
        largest = max(largest, differences.max().nan_to_num(math.inf).item())
        agreeing += int((got_TV.argmax(-1) == expected_TV.argmax(-1)).sum())
        variance += expected_TV.double().var().item() / len(ids)
        for name, values in (("trained", expected_TV), ("exported", got_TV)):
            log_probabilities = values.double().log_softmax(-1)
            nats[name] -= log_probabilities.gather(1, ids_T[1:, None]).sum().item()
    positions = ids.shape[0] * (ids.shape[1] - 1)
    return {
        "largest_difference": largest,
        "spread": math.sqrt(variance),
        "same_first_choice": agreeing / positions,
        "loss_as_trained": nats["trained"] / positions,
        "loss_as_exported": nats["exported"] / positions,
    }


def generate(model: Any, rows: list[list[int]], *, new: int, cached: bool) -> Any:
    """Greedy text of a batch, padded on its left, (B, new), with the logits that each was chosen
    by, (B, new, V).
    """
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,  # so that no end token ends it
        do_sample=False,
        num_beams=1,
        use_cache=cached,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, width:], torch.stack(output.logits, 1).float()


def apart(expected: tuple[Any, Any], got: tuple[Any, Any]) -> tuple[bool, float]:
    """Whether two greedy texts differ, and the largest difference of the logits they were chosen
    by, as far as both have seen the same text.
    """
    others = (expected[0] != got[0]).nonzero()
    seen = int(others[0]) + 1 if len(others) else len(expected[0])
    largest = (expected[1][:seen] - got[1][:seen]).abs().max().nan_to_num(math.inf)
    return len(others) > 0, float(largest)


def compare_generation(model: Any, prompts: list[list[int]], context: int) -> dict[str, float]:
    """Greedy text without a cache, with one, and as a batch that is padded on its left."""
    new = min(NEW_TOKENS, context - max(map(len, prompts)))
    found = {"with_cache": 0.0, "left_padded": 0.0, "other_texts": 0}
    if new < 1:
        return {"prompts": 0, "new_tokens": 0, **found}
    padded_ids, padded_logits = generate(model, prompts, new=new, cached=True)
    for number, prompt in enumerate(prompts):
        plain_ids, plain_logits = generate(model, [prompt], new=new, cached=False)
        cached_ids, cached_logits = generate(model, [prompt], new=new, cached=True)
        plain = (plain_ids[0], plain_logits[0])
        ways = {
            "with_cache": (cached_ids[0], cached_logits[0]),
            "left_padded": (padded_ids[number], padded_logits[number]),
        }
        for name, got in ways.items():
            is_other, difference = apart(plain, got)
            found["other_texts"] += int(is_other)
            found[name] = max(found[name], difference)
    return {"prompts": len(prompts), "new_tokens": new, **found}


def compare_tokenizer(tokenizer: Any, path: str) -> dict[str, int]:
    """Beside the data's own tokenizer: ids to text and text to ids, and how many come back whole.

    The file holds objects of `ids`, the `text` that they decode to, and the ids of that text,
    `again`.
    """
    pieces = json.loads(Path(path).read_text(encoding="utf-8"))
    counts = {"texts": len(pieces), "same_text": 0, "same_ids": 0, "came_back": 0}
    for piece in pieces:
        text = tokenizer.decode(
            piece["ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        ids = tokenizer.encode(piece["text"], add_special_tokens=False, split_special_tokens=True)
        counts["same_text"] += int(text == piece["text"])
        counts["same_ids"] += int(ids == piece["again"])
        counts["came_back"] += int(ids == piece["ids"])
    return counts


def signs(first: int, count: int) -> Any:
    """A fixed pattern of +1 and -1, (count,), fp64: numbers `first` and on, hashed."""
    import numpy as np

    hashed = (np.arange(first, first + count, dtype=np.uint64) * SIGN_MULTIPLIER) & 0xFFFFFFFF
    return 1.0 - 2.0 * ((hashed >> 31) & 1).astype(np.float64)


def folded(rows: Any, first: int, buckets: int) -> Any:
    """Rows, (R, C), numbered from `first`, as one signed sum for each `buckets`-th, (buckets,)."""
    import numpy as np

    count, width = rows.shape
    of_rows = (rows @ signs(0, width)) * signs(first, count)
    return np.bincount((first + np.arange(count)) % buckets, weights=of_rows, minlength=buckets)


def sketch(model: Any, ids_path: str) -> dict[str, Any]:
    """A few hundred numbers that change if any weight does, computed in fp32.

    Signed sums of the logits of windows, (windows, T): one of each position, and one of each
    bucket of the vocabulary; and of all ids' inputs. Each is divided by the root of the number of
    its terms, so that its scale is theirs. Signs keep what all share from hiding the rest.
    """
    import numpy as np
    import torch

    model.float()
    by_position = []
    width = model.config.vocab_size
    buckets = min(BUCKETS, width)
    vocabulary = np.zeros(buckets)
    variance = 0.0
    ids = np.load(ids_path)
    for row in ids:
        logits = model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].double().numpy()
        by_position.extend((logits @ signs(0, width) / math.sqrt(width)).tolist())
        vocabulary += folded(logits.T, 0, buckets)
        variance += logits.var() / len(ids)
    embedding = model.get_input_embeddings()
    inputs = np.zeros(buckets)
    squares = 0.0
    for first in range(0, width, IDS_AT_ONCE):
        some = torch.arange(first, min(first + IDS_AT_ONCE, width))
        embedded = embedding(some[None])[0].double().numpy()
        inputs += folded(embedded, first, buckets)
        squares += float((embedded**2).sum())
    terms = width / buckets
    return {
        "spread": math.sqrt(variance),
        "by_position": by_position,
        "by_vocabulary": (vocabulary / math.sqrt(terms * ids.size)).tolist(),
        "input_spread": math.sqrt(squares / (width * embedded.shape[1])),
        "inputs": (inputs / math.sqrt(terms * embedded.shape[1])).tolist(),
    }


def sums_of_weights(directory: str) -> dict[str, float]:
    """A signed sum over each tensor of the weights' files, in fp64, where it is nearly exact.

    It finds weights that move no logit by more than kernels differ by.
    """
    from safetensors import safe_open

    sums = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                sums[name] = 0.0
                numbers = file.get_tensor(name).reshape(-1)
                for first in range(0, len(numbers), NUMBERS_AT_ONCE):
                    block = numbers[first : first + NUMBERS_AT_ONCE].double().numpy()
                    sums[name] += float(block @ signs(first, len(block)))
    return sums


def versions() -> dict[str, str]:
    """Of what computed the figures."""
    import platform

    import safetensors
    import tokenizers
    import torch
    import transformers

    modules = (torch, transformers, tokenizers, safetensors)
    of_packages = {module.__name__: str(module.__version__) for module in modules}
    return {"python": platform.python_version(), **of_packages}


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request: what it names paths for is compared."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    offline = {"local_files_only": True, "trust_remote_code": request["trusts_code"]}
    # In the precision that it was saved in.
    model = AutoModelForCausalLM.from_pretrained(
        request["export"], dtype="auto", use_safetensors=True, **offline
    )
    model.eval()
    answer: dict[str, Any] = {"versions": versions()}
    with torch.no_grad():
        if request["logits"]:
            answer["logits"] = compare_logits(model, request["ids"], request["logits"])
        answer["generation"] = compare_generation(model, request["prompts"], request["context"])
        if request["texts"]:
            tokenizer = AutoTokenizer.from_pretrained(request["export"], **offline)
            answer["tokenizer"] = compare_tokenizer(tokenizer, request["texts"])
        # Last, since it makes an fp32 model of any.
        answer["sketch"] = sketch(model, request["sketched_ids"])
        answer["weights"] = sums_of_weights(request["export"])
    return answer


def answer_in_a_child(request: dict[str, Any]) -> int:
    """Fork, measure, write the answer or the error to the request's `answer`; the exit status."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        try:
            answer = measure(request)
        except Exception as error:
            # Whatever the libraries raise: it is said by who asked, in one line.
            answer = {"error": f"{type(error).__name__}: {error}"}
        Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
        code = 0
    finally:
        os._exit(code)


def serve() -> None:
    """Answer requests until there are no more."""
    # Answers go where standard output was; what libraries print goes with the errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    beginning = json.loads(sys.stdin.readline())
    sys.path.extend(beginning["paths"])
    sys.meta_path.insert(0, Refuser(beginning["refused"]))
    os.environ["HF_MODULES_CACHE"] = beginning["modules"]
    # Once, for all children.
    import torch  # noqa: F401
    import transformers.generation.utils
    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401

    for line in sys.stdin:
        code = answer_in_a_child(json.loads(line))
        answers.write(f"{code}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
