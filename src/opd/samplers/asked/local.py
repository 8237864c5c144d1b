"""A judge that is a model of this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.errors import OPDError
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.plugins import torch
from opd.samplers.asked.protocol import Question, Reply
from opd.types import Prompt, Sampler, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalJudge:
    """An untrained model as a judge. The random numbers of an answer are a function of its question."""

    lm: LanguageModel
    origin: Mapping[str, Any]  # the model's section of the recipe, and what else tells it from other models
    max_tokens: int
    retries: int = 2

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model's name and origin, and the longest answer."""
        return {"lm": self.lm.name, "origin": dict(self.origin), "max_tokens": self.max_tokens}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Replies, sampled in one batch per temperature. A question that is too long for the model is a failure.

        A batch that raises a RuntimeError, as torch does without memory, is sampled again `retries` times; then its
        questions have no answer. Raises DataError if a question is a conversation and the tokenizer has no chat
        template.
        """
        from opd.samplers.hf import TransformersSampler

        by_temperature: dict[float, list[int]] = {}
        for i, question in enumerate(questions):
            prompt = Prompt(id=number_of(question), content=question.content)
            length = len(render(prompt, self.lm.tokenizer, self.lm.template_options))
            if length + self.max_tokens > self.lm.positions:
                yield (
                    i,
                    Reply(
                        failure=f"the question has {length} tokens and an answer up to {self.max_tokens}, but "
                        f"{self.lm.name} has only {self.lm.positions:.0f} positions",
                        requests=0,
                    ),
                )
            else:
                by_temperature.setdefault(question.temperature, []).append(i)
        for temperature, rows in by_temperature.items():
            sampler = TransformersSampler(
                lm=self.lm, sampling=Sampling(max_completion_length=self.max_tokens, temperature=temperature)
            )
            prompts = [Prompt(id=number_of(questions[i]), content=questions[i].content) for i in rows]
            yield from zip(rows, self._answered(sampler, prompts), strict=True)

    def _answered(self, sampler: Sampler, prompts: Sequence[Prompt]) -> list[Reply]:
        for failed in range(self.retries + 1):
            try:
                written = sampler(prompts, seed=(0, 0))
            except OPDError:
                raise
            except RuntimeError as error:
                if failed == self.retries:
                    why = f"the judge {self.lm.name} raised {type(error).__name__}: {error}"
                    return [Reply(failure=why, requests=failed + 1) for _ in prompts]
                continue
            return [Reply(text=one.text, cut=not one.finished, requests=failed + 1) for one in written]
        raise AssertionError("the loop returns")


def weights_digest(lm: LanguageModel, places: int = 64) -> str:
    """A hash of the values at some places of each parameter: a path may later lead to other weights."""
    digest = hashlib.sha256()
    for name, parameter in lm.model.named_parameters():
        values = parameter.detach().flatten()
        at = torch.linspace(0, len(values) - 1, min(places, len(values)), device=values.device).long()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values[at].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def number_of(question: Question) -> int:
    """A hash of the question below 2^64: the prompt id that seeds its answer."""
    text = json.dumps([question.content, question.number, question.attempt], sort_keys=True, default=dict)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
