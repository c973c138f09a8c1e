"""A run's model as EleutherAI's lm-eval asks for one: log-likelihoods of texts, and answers.

Its texts are encoded as the data set's are, its windows are lm-eval's own, and documents are kept
apart in a run that was trained so. Nothing is cut to fit: what the context has no room for is
refused, where lm-eval would leave out the beginning of a prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from data_prep.errors import UserError
from data_prep.tokenizer.text_files import TextEncoder
from pretrain.evaluation.windows import BATCH_TOKENS
from pretrain.model.chunked_cross_entropy import factor, log_probability_chunks
from pretrain.model.loss import LanguageModelLoss

SAMPLING = ("temperature", "top_p", "top_k")  # what a task may ask of an answer that is drawn
SHOWN = 40  # characters of a prompt that is refused


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A continuation under the model."""

    log_probability: float
    is_greedy: bool  # whether each of its ids is the likeliest


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is to be scored, and what lies before it: at least one id each."""

    context: list[int]
    continuation: list[int]
    text: str  # the context's, for a message

    @property
    def length(self) -> int:
        """Ids that the model sees: all but the last."""
        return len(self.context) + len(self.continuation) - 1


class StopsBehind(StoppingCriteria):
    """Ends an answer once one of some texts stands in it."""

    def __init__(self, encoder: TextEncoder, prompt_tokens: int, texts: Sequence[str]) -> None:
        self.encoder = encoder
        self.prompt_tokens = prompt_tokens
        self.texts = [text for text in texts if text]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        answer = self.encoder.decode(input_ids[0, self.prompt_tokens :].tolist())
        is_done = any(text in answer for text in self.texts)
        return torch.full((1,), is_done, device=input_ids.device)


class RunModel(TemplateLM):  # type: ignore[misc]  # lm-eval gives no types
    """The fp32 masters of a run's checkpoint behind lm-eval's questions."""

    def __init__(self, module: LanguageModelLoss, encoder: TextEncoder) -> None:
        super().__init__()
        self.module = module
        self.encoder = encoder
        self.max_length = int(module.model.config.seq_len)
        self.cut_short = 0  # answers that the context had less room for than their task allows

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id, which also stands before a text without context."""
        return self.encoder.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests goes by."""
        return self.encoder.sha256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, as a data set holds them: nothing is added."""
        return self.encoder.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether it is the likeliest.

        Raises UserError for one that is empty, or that the context has no room for.
        """
        pairs = []
        for request in requests:
            context, continuation = request.args
            ids = ([self.prefix_token_id], self.encoder.encode(continuation))
            if context:
                ids = self._encode_pair(context, continuation)
            if not ids[1]:
                raise UserError(
                    f"task {request.task_name}: {continuation!r} behind {context[-SHOWN:]!r} gives "
                    "no token of its own to score; put a space between them (target_delimiter)"
                )
            pair = Pair(context=ids[0], continuation=ids[1], text=context)
            if pair.length > self.max_length:
                raise self._too_long(request.task_name, pair.length, context)
            pairs.append(pair)
        return [(each.log_probability, each.is_greedy) for each in self.score(pairs)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """The same of ids, which the base class asks for."""
        pairs = [Pair(context=ids, continuation=more, text="") for _, ids, more in requests]
        return [(each.log_probability, each.is_greedy) for each in self.score(pairs)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts in nats: each id once, in windows as lm-eval cuts them.

        Blocks side by side, the first behind an end-of-document id; the last, partial one has its
        window filled with what lies before it.
        """
        pairs = []
        text_of = []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.encoder.encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                context, continuation = make_disjoint_window(window)
                pairs.append(Pair(context=context, continuation=continuation, text=text))
                text_of.append(number)
        totals = [0.0] * len(requests)
        for number, scored in zip(text_of, self.score(pairs), strict=True):
            totals[number] += scored.log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each prompt, up to the first stop text of its task.

        Raises UserError for a prompt that leaves no room in the context, before any is answered.
        """
        prompts = []
        for request in requests:
            ids = self.encoder.encode(request.args[0]) or [self.prefix_token_id]
            if len(ids) >= self.max_length:
                raise self._too_long(request.task_name, len(ids), request.args[0])
            prompts.append(ids)
        answers = []
        asked = zip(prompts, requests, strict=True)
        for ids, request in tqdm(asked, total=len(requests), desc="answering", disable=None):
            answers.append(self._answer(ids, dict(request.args[1])))
        return answers

    @torch.inference_mode()
    def _answer(self, prompt: list[int], asked: dict[str, Any]) -> str:
        """What the model writes behind a prompt."""
        settings = normalize_gen_kwargs(asked)
        until = list(settings["until"])
        wanted = int(settings["max_gen_toks"])
        room = self.max_length - len(prompt)
        self.cut_short += wanted > room
        sampling: dict[str, Any] = {"do_sample": bool(settings["do_sample"])}
        if sampling["do_sample"]:
            sampling |= {name: settings[name] for name in SAMPLING if name in settings}
        ids_BT = torch.tensor([prompt], device=next(self.module.parameters()).device)
        stops = StoppingCriteriaList([StopsBehind(self.encoder, len(prompt), until)])
        model: Any = self.module.model
        written_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=min(wanted, room),
            eos_token_id=self.eot_token_id,
            pad_token_id=self.eot_token_id,
            stopping_criteria=stops,
            **sampling,
        )
        written = written_BT[0, len(prompt) :].tolist()
        if self.eot_token_id in written:
            written = written[: written.index(self.eot_token_id)]
        text: str = postprocess_generated_text(self.encoder.decode(written), until, None)
        return text

    def _too_long(self, task: str | None, length: int, text: str) -> UserError:
        beginning = text[:SHOWN]
        return UserError(
            f"task {task}: a prompt of {length:,} tokens ({beginning!r}...), but the model's "
            f"context is {self.max_length:,}; use fewer examples (num_fewshot) or shorter ones"
        )

    def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        """All pairs, in order; those of about one length together."""
        found: dict[int, Scored] = {}
        longest_first = sorted(range(len(pairs)), key=lambda number: -pairs[number].length)
        with tqdm(total=len(pairs), desc="scoring", disable=None) as progress:
            for numbers in self._batches(pairs, longest_first):
                scores = self._score_batch([pairs[number] for number in numbers])
                found |= dict(zip(numbers, scores, strict=True))
                progress.update(len(numbers))
        return [found[number] for number in range(len(pairs))]

    def _batches(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Runs of pairs that the model sees at once."""
        first = 0
        while first < len(numbers):
            at_once = max(1, BATCH_TOKENS // pairs[numbers[first]].length)
            yield numbers[first : first + at_once]
            first += at_once

    @torch.inference_mode()
    def _score_batch(self, pairs: Sequence[Pair]) -> list[Scored]:
        """Some pairs, filled up on the right, where nothing that counts sees it."""
        longest = max(pair.length for pair in pairs)
        weight = self.module.model.lm_head.weight
        rows = []
        targets = []
        for pair in pairs:
            ids = torch.tensor([*pair.context, *pair.continuation[:-1]], device=weight.device)
            rows.append(F.pad(ids, (0, longest - len(ids)), value=self.eot_token_id))
            targets.append(torch.tensor(pair.continuation, device=weight.device))
        hidden_BTD = self.module.hidden_states(torch.stack(rows))
        hidden = []
        for row, pair in enumerate(pairs):
            first = (
                len(pair.context) - 1
            )  # what stands there says what the continuation begins with
            hidden.append(hidden_BTD[row, first : pair.length])
        targets_N = torch.cat(targets)
        log_probability_N = torch.empty(len(targets_N), dtype=torch.float64)
        is_likeliest_N = torch.empty(len(targets_N), dtype=torch.bool)
        for chunk in log_probability_chunks(torch.cat(hidden), factor(weight), targets_N, None):
            of_targets_C1 = chunk.log_probs.gather(1, chunk.targets)
            log_probability_N[chunk.place] = of_targets_C1[:, 0].double().cpu()
            likeliest_C1 = chunk.log_probs.argmax(dim=-1, keepdim=True)
            is_likeliest_N[chunk.place] = (likeliest_C1 == chunk.targets)[:, 0].cpu()
        lengths = [len(pair.continuation) for pair in pairs]
        return [
            Scored(log_probability=float(nats.sum()), is_greedy=bool(likeliest.all()))
            for nats, likeliest in zip(
                log_probability_N.split(lengths), is_likeliest_N.split(lengths), strict=True
            )
        ]
