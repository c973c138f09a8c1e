"""A small trained model exported in both forms, and what its training class computes: by that the
matrix is judged.

The run is a real one, on real text, short, and long enough that greedy text says something. Nothing
here generates through transformers: greedy and beam search are a few lines each around the training
class's logits, without a cache.
"""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support.runs import TINY_VOCAB_SIZE, train, write_recipe
from tokenizers import Tokenizer
from torch import Tensor

from pretrain import export_hf
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.reader import load_model
from pretrain.modeling_tablefree import TableFreeForCausalLM

FORMS = ("tablefree", "gpt_neox")
# so little text that the model has it by heart: greedy text is no stammer
ADDRESSES, CHARACTERS = 8, 1500
SEQ_LEN = 128
STEPS = 240
DRAFT_STEP = 120  # the export that assists is of this step: it guesses right often, and wrong often
NEW_TOKENS = 24
BEAMS = 3
CLEAR_MARGIN = 1e-3  # of the best logit over the second: far above what kernels differ by
BEGINNING = "Fellow-Citizens of the Senate and House of Representatives:\n\n"
PROMPTS = (
    BEGINNING + "I embrace with great",
    BEGINNING + "In meeting you again I feel much",
    BEGINNING[:15],
)
TEXTS = (
    "Fellow citizens \u2014 1,024 souls\n\tend",
    "  two  spaces, a tab\tand\n\nempty lines  ",
    "cafe\u0301, na\u00efve, \u65e5\u672c\u8a9e, \U0001f642\u200d\U0001f642 don't 3.14159",
    "",
)
SCORED = ("Fellow-Citizens of the Senate and", " House of Representatives")
ROW_LENGTHS = (60, 8)
CARD_NEW_TOKENS = 3
CARD_PROMPT = "Question: What is the capital of France?\nAnswer:"


def train_and_export(data: Path, home: Path, code: str = "binary_code") -> Path:
    """Train on a data set, export both forms of the last step and of an earlier one; gives the
    run's directory.
    """
    recipe = write_recipe(
        home / "recipe.yaml",
        model={
            "d_model": 64,
            "num_layers": 3,
            "num_heads": 2,  # vLLM wants 32 channels a head
            "seq_len": SEQ_LEN,
            "input_embedding": code,
            "code_bits": None if code == "learned" else 16,
        },
        batch={"global_batch_tokens": 8 * SEQ_LEN, "micro_batch_size": 8},
        checkpoints={"every_steps": DRAFT_STEP, "keep_every": DRAFT_STEP},
        validation={"every_steps": STEPS},
        train_tokens=STEPS * 8 * SEQ_LEN,
    )
    run_dir = home / "run"
    train(1, recipe, data, run_dir)
    for form in FORMS:
        for name, step in ((form, STEPS), (f"draft_{form}", DRAFT_STEP)):
            flags = [
                "--run-dir",
                str(run_dir),
                "--output-dir",
                str(home / name),
                "--step",
                str(step),
            ]
            with redirect_stdout(io.StringIO()):
                export_hf.main([*flags, "--architecture", form])
    return run_dir


def next_logits(model: TableFreeForCausalLM, ids: list[int]) -> Tensor:
    """Logits (V,) of what follows."""
    return model(torch.tensor([ids])).logits[0, -1]


def greedy(
    model: TableFreeForCausalLM, prompt: list[int], steps: int, eos_id: int
) -> tuple[list[int], list[Any]]:
    """The likeliest id, `steps` times or up to the end token, and the logits it was chosen by."""
    new: list[int] = []
    chosen_by: list[Any] = []
    while len(new) < steps and eos_id not in new:
        logits = next_logits(model, prompt + new)
        best, second = logits.topk(2).values.tolist()
        if best - second < CLEAR_MARGIN:  # as good as a tie: which comes first, the kernel decides
            break
        new.append(int(logits.argmax()))
        chosen_by.append(logits.tolist())
    return new, chosen_by


def beam_search(
    model: TableFreeForCausalLM, prompt: list[int], steps: int, eos_id: int
) -> list[list[int]]:
    """The likeliest continuations of that length, best first, the end token left out."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        candidates = []
        for score, new in beams:
            log_probabilities = F.log_softmax(next_logits(model, prompt + new), dim=-1)
            log_probabilities[eos_id] = -torch.inf
            best = log_probabilities.topk(BEAMS)
            candidates += [
                (score + value, [*new, token])
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(candidates, key=lambda candidate: -candidate[0])[:BEAMS]
    return [new for _, new in beams]


def log_likelihood(model: TableFreeForCausalLM, ids: list[int], context: int) -> float:
    """Nats, negative, of the ids after the first `context` ones."""
    log_probabilities = F.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)
    chosen = log_probabilities.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return chosen[context - 1 :].sum().item()


def last_hidden_state(model: TableFreeForCausalLM, ids: Tensor) -> Tensor:
    """What enters the output projection, (B, T, D)."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    model(ids)
    hook.remove()
    return seen[0]


def training_figures(model: TableFreeForCausalLM, rows: list[list[int]]) -> dict[str, Any]:
    """Loss and norm of the gradient of one step over rows of unequal length: the mean over all
    their targets.
    """
    model.zero_grad()
    nats = [
        F.cross_entropy(
            model(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="sum"
        )
        for row in rows
    ]
    loss = torch.stack(nats).sum() / sum(len(row) - 1 for row in rows)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    return {
        "training_rows": rows,
        "training_loss": loss.item(),
        "training_gradient_norm": norm.item(),
        "has_input_table": model.config.input_embedding == "learned",
    }


def first_gradient(model: TableFreeForCausalLM, ids: Tensor) -> dict[str, Any]:
    """The gradient of the first block's first matrix, of the mean loss over a batch."""
    suffix = "layers.0.attention.query_key_value.weight"
    model.zero_grad()
    logits = model(ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    (weight,) = (parameter for name, parameter in model.named_parameters() if name.endswith(suffix))
    assert weight.grad is not None
    gradient = weight.grad.tolist()
    model.zero_grad()
    return {"first_weight": suffix, "first_gradient": gradient}


def write_reference(run_dir: Path, home: Path) -> dict[str, Any]:
    """Compute with the training class what rows.py compares with, and write it."""
    model = load_model(load_for_reading(run_dir, STEPS)).eval()
    definition = run_dir / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(definition))
    tokenizer.encode_special_tokens = True  # as data preparation has it
    eos_id = load_for_reading(run_dir, STEPS).manifest.data.eos_id

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    ids = torch.randint(0, TINY_VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    prompts = [encode(text) for text in PROMPTS]
    rows = [encode(" ".join(PROMPTS) * 8)[:length] for length in ROW_LENGTHS]
    assert [len(row) for row in rows] == [*ROW_LENGTHS]
    with torch.no_grad():
        output = model(ids)
        continued = [greedy(model, prompt, NEW_TOKENS, eos_id) for prompt in prompts]
        beams = beam_search(model, prompts[0], NEW_TOKENS // 2, eos_id)
        hidden = last_hidden_state(model, ids)
        nats = log_likelihood(model, encode(SCORED[0] + SCORED[1]), len(encode(SCORED[0])))
        by_the_card = (
            encode(CARD_PROMPT) + greedy(model, encode(CARD_PROMPT), CARD_NEW_TOKENS, eos_id)[0]
        )
    reference = {
        "ids": ids.tolist(),
        "logits": output.logits.tolist(),
        "hidden": hidden.tolist(),
        "layers": model.config.num_layers,
        "eos_id": eos_id,
        "prompts": prompts,
        "texts_of_prompts": PROMPTS,
        "greedy": [new for new, _ in continued],
        "greedy_logits": continued[0][1],
        "greedy_text": tokenizer.decode(continued[0][0], skip_special_tokens=True),
        "num_beams": BEAMS,
        "beams": beams,
        "texts": {text: encode(text) for text in TEXTS},
        "printed_by_the_card": tokenizer.decode(by_the_card, skip_special_tokens=False) + "\n",
        "scored": {"context": SCORED[0], "continuation": SCORED[1], "log_likelihood": nats},
        **training_figures(model, rows),
        **first_gradient(model, ids),
    }
    (home / "reference.json").write_text(json.dumps(reference), encoding="utf-8")
    return reference
