"""What people do with an export, a row each, under the transformers of the interpreter that runs
this.

    python rows.py HOME OUTCOMES.json

HOME holds what tests/pretrain/hf/test_matrix.py laid there: `tablefree`, `gpt_neox`, the two forms;
`draft_tablefree`, `draft_gpt_neox`, those of an earlier step; `reference.json`, what the training
class computes (see reference.py). A row compares with that, never with transformers itself. Written
are the version, and for each form and row null where all was as the training class has it, else the
error in one line. Neither the project nor pytest is at hand here.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
)

FORMS = ("tablefree", "gpt_neox")
LOGITS_TOLERANCE = 2e-4  # the logits spread over some 10; kernels differ in the order of sums only
LOSS_TOLERANCE = 1e-4  # Trainer logs that many digits
CACHE_LENGTH = 64
# their Trainer counts a row's first id as a target, which no causal model has
COUNT_FIRST_IDS = ("4.57.6", "5.0.0")
MANY_CHARACTERS = 300  # of an error's message


@dataclass(frozen=True)
class Case:
    """One form of the export, and what is right."""

    form: str
    home: Path
    reference: dict[str, Any]

    @property
    def directory(self) -> Path:
        return self.home / self.form

    def model(self, **options: Any) -> Any:
        """The model, ready for use."""
        return load(self.directory, **options)

    def tokenizer(self) -> Any:
        """The tokenizer, as the card says to load it."""
        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=True)

    def prompt(self) -> Tensor:
        """The ids of the first prompt, (1, T)."""
        return torch.tensor(self.reference["prompts"][:1])

    def greedy(self) -> list[int]:
        """The ids that greedily follow the first prompt."""
        return list(self.reference["greedy"][0])


def load(directory: Path, **options: Any) -> Any:
    """A model of an export."""
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


ROWS: dict[str, Callable[[Case], None]] = {}


def row(name: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Make a function a row of the matrix."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        ROWS[name] = function
        return function

    return register


def expect_equal(got: Any, expected: Any) -> None:
    """Raise AssertionError where two values differ."""
    if got != expected:
        raise AssertionError(f"other than the training class: {got!r}, expected {expected!r}")


def expect_close(got: Tensor, expected: Any, tolerance: float = LOGITS_TOLERANCE) -> None:
    """Raise AssertionError where a tensor is further from the expected values than that."""
    wanted = torch.as_tensor(expected)
    if got.shape != wanted.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    distance = float((got.detach().float() - wanted).abs().max())
    if not distance <= tolerance:  # so that NaN fails too
        raise AssertionError(f"{distance:.3g} from the training class")


def continue_greedily(case: Case, model: Any = None, **options: Any) -> None:
    """Generate from the first prompt; the ids must be the training class's."""
    prompt = case.prompt()
    expected = case.greedy()
    model = model or case.model()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=len(expected),
        **options,
    )
    expect_equal(output[0, prompt.shape[1] :].tolist(), expected)


# Loading


@row("load: every weight found, none left over")
def load_completely(case: Case) -> None:
    options = {"trust_remote_code": True} if case.form == "tablefree" else {}
    AutoConfig.from_pretrained(case.directory, **options)
    _, info = AutoModelForCausalLM.from_pretrained(
        case.directory, output_loading_info=True, **options
    )
    expect_equal({kind: sorted(names) for kind, names in info.items() if names}, {})


@row("logits")
def logits(case: Case) -> None:
    ids = torch.tensor(case.reference["ids"])
    model = case.model()
    expect_close(model(ids).logits, case.reference["logits"])
    expect_close(
        model(ids, logits_to_keep=1).logits[:, -1], torch.tensor(case.reference["logits"])[:, -1]
    )


@row('logits, loaded with `device_map="auto"`')
def logits_by_device_map(case: Case) -> None:
    ids = torch.tensor(case.reference["ids"])
    expect_close(case.model(device_map="auto")(ids).logits, case.reference["logits"])


@row("logits, eager attention")
def logits_of_eager_attention(case: Case) -> None:
    ids = torch.tensor(case.reference["ids"])
    expect_close(case.model(attn_implementation="eager")(ids).logits, case.reference["logits"])


@row("logits in bfloat16")
def logits_in_bfloat16(case: Case) -> None:
    ids = torch.tensor(case.reference["ids"])
    model = case.model(dtype=torch.bfloat16)
    expect_equal({parameter.dtype for parameter in model.parameters()}, {torch.bfloat16})
    spread = torch.tensor(case.reference["logits"]).std()
    expect_close(model(ids).logits, case.reference["logits"], tolerance=float(spread) / 4)


@row("`AutoModel`: the last hidden state")
def last_hidden_state(case: Case) -> None:
    model = AutoModel.from_pretrained(case.directory, trust_remote_code=True).eval()
    hidden = model(torch.tensor(case.reference["ids"])).last_hidden_state
    expect_close(hidden, case.reference["hidden"])


@row("`output_hidden_states`")
def all_hidden_states(case: Case) -> None:
    output = case.model()(torch.tensor(case.reference["ids"]), output_hidden_states=True)
    expect_equal(len(output.hidden_states), case.reference["layers"] + 1)
    expect_close(output.hidden_states[-1], case.reference["hidden"])


@row("`inputs_embeds`")
def from_embeddings(case: Case) -> None:
    model = case.model()
    embeddings = model.get_input_embeddings()(torch.tensor(case.reference["ids"]))
    expect_close(model(inputs_embeds=embeddings).logits, case.reference["logits"])


# Caches


def in_two_parts(case: Case, model: Any, filled: Any) -> None:
    """Logits of the second half of a text, the first being in the cache."""
    ids = torch.tensor(case.reference["ids"])
    half = ids.shape[1] // 2
    first = model(ids[:, :half], past_key_values=filled, use_cache=True)
    second = model(ids[:, half:], past_key_values=first.past_key_values, use_cache=True)
    expect_close(torch.cat((first.logits, second.logits), dim=1), case.reference["logits"])


@row("`forward` on a dynamic cache")
def forward_on_a_dynamic_cache(case: Case) -> None:
    model = case.model()
    in_two_parts(case, model, None)
    in_two_parts(case, model, DynamicCache(config=model.config))


@row("`forward` on a static cache")
def forward_on_a_static_cache(case: Case) -> None:
    model = case.model()
    in_two_parts(case, model, StaticCache(config=model.config, max_cache_len=CACHE_LENGTH))


@row("greedy, dynamic cache")
def greedy_with_a_dynamic_cache(case: Case) -> None:
    continue_greedily(case)
    continue_greedily(case, cache_implementation="dynamic")
    continue_greedily(case, past_key_values=DynamicCache())


@row("greedy, static cache")
def greedy_with_a_static_cache(case: Case) -> None:
    continue_greedily(case, cache_implementation="static")


@row("greedy, no cache")
def greedy_without_a_cache(case: Case) -> None:
    continue_greedily(case, use_cache=False)


@row("greedy, prompt in chunks (`prefill_chunk_size`)")
def greedy_with_a_prompt_in_chunks(case: Case) -> None:
    continue_greedily(case, prefill_chunk_size=3)


@row("scores of each step")
def scores_of_each_step(case: Case) -> None:
    prompt = case.prompt()
    output = case.model().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=len(case.greedy()),
        return_dict_in_generate=True,
        output_logits=True,
    )
    expect_close(torch.stack(output.logits, dim=1)[0], case.reference["greedy_logits"])


# Other ways to generate


@row("beams")
def beams(case: Case) -> None:
    prompt = case.prompt()
    wanted = case.reference["beams"]
    output = case.model().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=case.reference["num_beams"],
        num_return_sequences=len(wanted),
        min_new_tokens=len(wanted[0]),
        max_new_tokens=len(wanted[0]),
    )
    expect_equal(output[:, prompt.shape[1] :].tolist(), wanted)


@row("left-padded batch")
def left_padded_batch(case: Case) -> None:
    tokenizer = case.tokenizer()
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": case.reference["prompts"]}, return_tensors="pt")
    longest = batch["input_ids"].shape[1]
    if bool(batch["attention_mask"].all()):
        raise AssertionError("prompts of one length pad nothing")
    steps = max(map(len, case.reference["greedy"]))
    output = case.model().generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=steps,
    )
    for new, expected in zip(output[:, longest:].tolist(), case.reference["greedy"], strict=True):
        expect_equal(new[: len(expected)], expected)


@row("assisted by an earlier step's export")
def assisted(case: Case) -> None:
    draft = load(case.home / f"draft_{case.form}")
    continue_greedily(case, assistant_model=draft)


@row("prompt lookup")
def prompt_lookup(case: Case) -> None:
    continue_greedily(case, prompt_lookup_num_tokens=4)


# Tokenizer


@row("tokenizer: the data's ids, and back")
def tokenizer_ids(case: Case) -> None:
    tokenizer = case.tokenizer()
    for text, ids in case.reference["texts"].items():
        expect_equal(tokenizer(text)["input_ids"], ids)
        expect_equal(tokenizer.encode(text), ids)
        expect_equal(tokenizer.decode(ids, clean_up_tokenization_spaces=False), text)


@row("tokenizer: saved, loaded, the same")
def tokenizer_saved_and_loaded(case: Case) -> None:
    with tempfile.TemporaryDirectory() as directory:
        case.tokenizer().save_pretrained(directory)
        again = AutoTokenizer.from_pretrained(directory)
        for text, ids in case.reference["texts"].items():
            expect_equal(again(text)["input_ids"], ids)


@row("tokenizer: the end token is one id")
def end_token(case: Case) -> None:
    tokenizer = case.tokenizer()
    expect_equal(tokenizer.eos_token_id, case.reference["eos_id"])
    expect_equal(tokenizer.encode("a" + tokenizer.eos_token)[-1], case.reference["eos_id"])


@row("`model.generate(**tokenizer(text))`")
def generate_from_what_the_tokenizer_gives(case: Case) -> None:
    expected = case.greedy()
    inputs = case.tokenizer()(case.reference["texts_of_prompts"][0], return_tensors="pt")
    output = case.model().generate(**inputs, do_sample=False, max_new_tokens=len(expected))
    expect_equal(output[0, case.prompt().shape[1] :].tolist(), expected)


@row('`pipeline("text-generation")`')
def text_generation_pipeline(case: Case) -> None:
    from transformers import pipeline  # loads torchvision where there is one, fit or unfit

    generator = pipeline("text-generation", model=str(case.directory), trust_remote_code=True)
    text = case.reference["texts_of_prompts"][0]
    (output,) = generator(
        text, do_sample=False, max_new_tokens=len(case.greedy()), return_full_text=False
    )
    expect_equal(output["generated_text"], case.reference["greedy_text"])


@row("the card's example, word for word")
def example_of_the_card(case: Case) -> None:
    card = (case.directory / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("REPOSITORY", str(case.directory)), {"__name__": "example"})
    expect_equal(printed.getvalue(), case.reference["printed_by_the_card"])


# Training on, and saving


def train_a_step(case: Case, rows_at_a_time: int, **options: Any) -> dict[str, float]:
    """What Trainer logs of one step over the two rows of unequal length; the weights stay as
    they are.
    """
    # which needs accelerate; not every engine's environment has it
    from transformers import Trainer, TrainingArguments

    model = case.model()
    # so that the norm of the gradient is over the same weights in both forms
    if case.form == "gpt_neox" and not case.reference["has_input_table"]:
        model.get_input_embeddings().weight.requires_grad_(False)
    rows = case.reference["training_rows"]
    longest = max(map(len, rows))

    def collate(chosen: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = longest if len(chosen) > 1 else len(chosen[0]["input_ids"])
        padded = [(row["input_ids"], length - len(row["input_ids"])) for row in chosen]
        return {
            "input_ids": torch.tensor([ids + [0] * padding for ids, padding in padded]),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * padding for ids, padding in padded]
            ),
            "labels": torch.tensor([ids + [-100] * padding for ids, padding in padded]),
        }

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=rows_at_a_time,
            gradient_accumulation_steps=len(rows) // rows_at_a_time,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            max_grad_norm=1e9,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        dataset = [{"input_ids": ids} for ids in rows]
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    return dict(trainer.state.log_history[0])


def expect_the_step(case: Case, logged: dict[str, float]) -> None:
    """Loss and norm of the gradient must be those of the mean over all targets of the step, as
    that Trainer counts.
    """
    share = 1.0
    if transformers.__version__ in COUNT_FIRST_IDS:
        rows = case.reference["training_rows"]
        share = sum(len(ids) - 1 for ids in rows) / sum(map(len, rows))
    expect_close(
        torch.tensor(logged["loss"]), share * case.reference["training_loss"], LOSS_TOLERANCE
    )
    norm = share * case.reference["training_gradient_norm"]
    expect_close(torch.tensor(logged["grad_norm"]), norm, tolerance=1e-3 * norm)


@row("Trainer: loss and gradient of a padded batch")
def trainer_with_a_padded_batch(case: Case) -> None:
    expect_the_step(case, train_a_step(case, rows_at_a_time=2))


@row("Trainer: the same, accumulated")
def trainer_with_accumulation(case: Case) -> None:
    expect_the_step(case, train_a_step(case, rows_at_a_time=1))


@row("gradient checkpointing, both kinds")
def gradient_checkpointing(case: Case) -> None:
    ids = torch.tensor(case.reference["ids"])
    for reentrant in (False, True):
        model = case.model().train()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        if not model.is_gradient_checkpointing:
            raise AssertionError("gradient_checkpointing_enable() did nothing")
        model(ids, labels=ids, use_cache=False).loss.backward()
        (weight,) = (
            p
            for name, p in model.named_parameters()
            if name.endswith(case.reference["first_weight"])
        )
        expect_close(weight.grad, case.reference["first_gradient"], tolerance=1e-5)


@row("`enable_input_require_grads()`")
def input_require_grads(case: Case) -> None:
    ids = torch.tensor(case.reference["ids"])
    model = case.model().train()
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    (weight,) = (
        p for name, p in model.named_parameters() if name.endswith(case.reference["first_weight"])
    )
    expect_close(weight.grad, case.reference["first_gradient"], tolerance=1e-5)


@row("saved, loaded, the same")
def saved_and_loaded(case: Case) -> None:
    ids = torch.tensor(case.reference["ids"])
    with tempfile.TemporaryDirectory() as directory:
        case.model().save_pretrained(directory)
        saved_code, code = (
            sorted(path.name for path in at.glob("*.py"))
            for at in (Path(directory), case.directory)
        )
        expect_equal(saved_code, code)
        expect_close(load(Path(directory))(ids).logits, case.reference["logits"])


def one_line(error: BaseException) -> str:
    """An error in one line, cut where it is long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MANY_CHARACTERS else text[:MANY_CHARACTERS] + " ..."


def outcome(function: Callable[[Case], None], case: Case) -> str | None:
    """None where a row is right, else what was wrong."""
    torch.manual_seed(0)
    try:
        function(case)
    except Exception as error:
        return one_line(error)
    return None


def main() -> None:
    """The program."""
    home, outcomes_path = map(Path, sys.argv[1:3])
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    reference = json.loads((home / "reference.json").read_bytes())
    outcomes = {
        form: {name: outcome(f, Case(form, home, reference)) for name, f in ROWS.items()}
        for form in FORMS
    }
    content = {"transformers": transformers.__version__, "forms": outcomes}
    outcomes_path.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
