"""A model of opd for the tasks of lm-eval (EleutherAI's lm-evaluation-harness): it writes and scores their texts.

The responses come from the sampler of training and evaluation, with its end tokens, adapters and GGUF files. Needs the
extra `opd[tasks]`; import this file only after `evaluation.tasks.require`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from opd.errors import ConfigError
from opd.models.forward import batches, response_states
from opd.models.language_model import LanguageModel, evaluating
from opd.models.render import chat_text, render
from opd.samplers.hf import TransformersSampler
from opd.types import Prompt, ReservedStep, Rollout, Sampling

LIMIT = 256  # tokens of a response where neither the task nor the user says; lm-eval's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Settings of generation that take the place of a task's; None: the task's."""

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_completion_length: int | None = None

    def sampling(self, task: str, asked: Mapping[str, Any]) -> Sampling:
        """The settings of a task with the generation arguments `asked`.

        Without `do_sample` and a temperature it is greedy, as in lm-eval. Raises ConfigError for several equal samples.
        """
        temperature = asked.get("temperature")
        if temperature is None or asked.get("do_sample") is False:
            temperature = 1.0 if asked.get("do_sample") and temperature is None else 0.0
        temperature = temperature if self.temperature is None else self.temperature
        if temperature == 0 and self.n > 1:
            raise ConfigError(
                f"Task {task} is answered greedily (temperature 0), so the {self.n} responses per prompt of --n would "
                "be equal. Give --temperature too, e.g. --temperature 0.7, or leave out --n."
            )
        until = asked.get("until") or []
        own = {"top_p": asked.get("top_p", 1.0), "max_completion_length": asked.get("max_gen_toks", LIMIT)}
        given = {"top_p": self.top_p, "max_completion_length": self.max_completion_length}
        return Sampling(
            n=self.n,
            temperature=temperature,
            top_k=asked.get("top_k", 0) if self.temperature is None else 0,
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            **{name: own[name] if value is None else value for name, value in given.items()},
        )


class HarnessModel(TemplateLM):
    """lm-eval's interface over a `LanguageModel`.

    All `n` responses to a request are written when it first comes. Each call of lm-eval gets those of `sample`, so that
    lm-eval scores the samples one after the other.
    """

    def __init__(self, lm: LanguageModel, override: Override, seed: int, tokens: int) -> None:
        """`tokens`: the most in one forward pass that scores texts, padding included."""
        super().__init__()
        self.lm, self.override, self.seed, self.tokens = lm, override, seed, tokens
        self.tokenizer = lm.tokenizer
        self.sample = 0
        self.written: dict[tuple[str, str], list[Rollout]] = {}  # by (context, generation arguments)
        self.of_task: dict[str, list[Rollout]] = {}
        self._chats: dict[str, tuple[dict[str, str], ...]] = {}  # messages by the text that they are rendered to

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token, for texts without a context where there is no beginning-of-sequence token."""
        found = self.tokenizer.eos_token_id
        if found is None:
            raise ConfigError(
                f"{self.lm.name}: a text without a context is scored after a beginning-of-sequence or end-of-sequence "
                "token, and the tokenizer has neither. Set its eos_token."
            )
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without `add_generation_prompt` its last message, the answer's, goes on."""
        *before, last = chat_history
        messages, prefill = (chat_history, "") if add_generation_prompt else (before, last["content"])
        prompt = Prompt(id=0, content=tuple(messages))
        text = chat_text(prompt, self.tokenizer, self.lm.template_options) + prefill
        self._chats[text.removesuffix(prefill)] = tuple(messages)
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. By default with the tokenizer's special tokens, unless a chat template wrote them."""
        if add_special_tokens is False or (add_special_tokens is None and self._chats):
            return self.tokenizer(string, add_special_tokens=False).input_ids
        return render(Prompt(id=0, content=string), self.tokenizer)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The current sample of each request, cut before the first of its stop strings."""
        missing: dict[str, list[Any]] = {}
        for request in requests:
            context, asked = request.args
            if (context, repr(asked)) not in self.written:
                missing.setdefault(f"{request.task_name} {asked!r}", []).append(request)
        for group in missing.values():
            self._write(group)
        texts: list[str] = []
        for request in requests:
            context, asked = request.args
            rollout = self.written[context, repr(asked)][self.sample]
            texts.append(cut(rollout.text, self.override.sampling(request.task_name, asked).stop))
        return texts

    def _write(self, requests: Sequence[Any]) -> None:
        """All samples of requests of one task with equal generation arguments."""
        task, asked = requests[0].task_name, requests[0].args[1]
        sampling = self.override.sampling(task, asked)
        by_context = {request.args[0]: request.doc_id for request in requests}  # equal contexts are one prompt
        prompts = [self._prompt(doc_id, context) for context, doc_id in by_context.items()]
        sampler = TransformersSampler(lm=self.lm, sampling=sampling, limited_by="--max-completion-length")
        rollouts = sampler(prompts, seed=(self.seed, ReservedStep.EVALUATION))
        for i, context in enumerate(by_context):
            self.written[context, repr(asked)] = rollouts[i * sampling.n : (i + 1) * sampling.n]
        self.of_task.setdefault(task, []).extend(rollouts)

    def _prompt(self, doc_id: int, context: str) -> Prompt:
        """A context as a prompt: with its messages, if the chat template wrote it."""
        begin = context if context in self._chats else max(filter(context.startswith, self._chats), key=len, default="")
        if not begin:
            return Prompt(id=doc_id, content=context)
        return Prompt(id=doc_id, content=self._chats[begin], prefill=context.removeprefix(begin))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(the log-probability of each continuation, whether greedy decoding writes it), in the order of the requests.

        Raises DataError for a text longer than the model's positions: no text is cut.
        """
        before = [context for _, context, _ in requests]
        after = [continuation for _, _, continuation in requests]
        for context, continuation in zip(before, after, strict=True):
            self.lm.check_length(len(context) + len(continuation), "Leave out the longest texts, or give fewer shots.")
        found: dict[int, tuple[float, bool]] = {}
        head = self.lm.head()
        free = torch.no_grad() if self.lm.autocast else torch.inference_mode()
        with evaluating(self.lm.model), self.lm.casting_once(), free:
            for batch in batches(self.lm, before, [len(ids) for ids in after], self.tokens):
                states = response_states(self.lm, [before[i] for i in batch], [after[i] for i in batch])
                for row, i in enumerate(batch):
                    ids = torch.tensor(after[i], device=self.lm.device)
                    logp = head.logits(states.of(row, len(ids))).log_softmax(-1)
                    greedy = bool((logp.argmax(-1) == ids).all())
                    found[i] = (logp.gather(-1, ids[:, None]).sum().item(), greedy)
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the model's positions, which share one token."""
        totals: list[float] = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            longest = int(min(self.lm.positions, len(ids) + 1))
            windows = get_rolling_token_windows(ids, self.prefix_token_id, longest, 1)
            scored = self._loglikelihood_tokens([((text, ""), *make_disjoint_window(window)) for window in windows])
            totals.append(sum(logp for logp, _ in scored))
        return totals


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text
