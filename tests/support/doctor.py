"""Pairs of tiny models, taught here in seconds, that a doctor has to tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch

from opd.commands.doctor import bias
from opd.commands.doctor.examine import examine
from opd.commands.doctor.findings import Finding, Report
from opd.commands.doctor.subject import Subject, subject_of
from opd.data.toy import addition
from opd.models.forward import right_padded
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.recipe.load import parse_recipe
from opd.recipe.schema import Recipe
from opd.runs.prepare import Given
from opd.runs.prepare import prepare as prepared_of
from opd.samplers.writers import ReferenceWriter
from opd.types import Prompt
from support.models import byte_tokenizer, tiny

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def characters(name: str, *, seed: int, hidden: int = 32) -> LanguageModel:
    """A model that reads and writes sums, one token a character."""
    return tiny("llama", character_tokenizer("0123456789+=,;"), name=name, seed=seed, hidden=hidden, spread=0.1)


def chatting(name: str, *, seed: int, template: str = CHAT, end: str = "<eos>", hidden: int = 32) -> LanguageModel:
    """A model that reads messages, one token a byte, and ends its words with `end`, a special token of all of these."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.eos_token = end
    tokenizer.chat_template = template.replace("END", end)
    return tiny("llama", tokenizer, name=name, seed=seed, hidden=hidden, spread=0.1)


def sums(count: int = 32, *, chat: bool = False) -> list[Prompt]:
    """One-digit sums with worked responses."""
    return [
        Prompt(
            id=i,
            content=({"role": "user", "content": row["prompt"]},) if chat else row["prompt"],
            response=row["response"],
            answer=row["answer"],
        )
        for i, row in enumerate(addition(count=count, digits=1))
    ]


def letters(count: int = 48, *, seed: int = 0) -> list[Prompt]:
    """A number is asked for a letter that nothing in it tells: the privileged context does."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(8, (count,), generator=draw).tolist()
    return [
        Prompt(
            id=i, content=f"{i:02d}=", response="abcdefgh"[c], answer="abcdefgh"[c], privileged_context="abcdefgh"[c]
        )
        for i, c in enumerate(chosen)
    ]


def with_context(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a teacher with privileged information reads them."""
    return [replace(p, content=f"{p.privileged_context};{p.content}") for p in prompts]


def teach(lm: LanguageModel, prompts: Sequence[Prompt], *, steps: int, learning_rate: float = 1e-2) -> LanguageModel:
    """`steps` of maximum likelihood on the prompts' responses, all in every step."""
    rollouts = ReferenceWriter(student=lm)(prompts, seed=(0, 0))
    rows = [(*rollout.prompt_ids, *rollout.response_ids.tolist()) for rollout in rollouts]
    ids = right_padded(rows, lm.device)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for i, rollout in enumerate(rollouts):
        wanted[i, len(rollout.prompt_ids) : len(rows[i])] = True
    optimiser = torch.optim.Adam(lm.trainable().values(), learning_rate)
    for _ in range(steps):
        logp = lm.causal_lm(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        loss = -logp[wanted[:, 1:]].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    return lm


def recipe_of(*, models: Sequence[str] = ("student", "teacher"), **stage: Any) -> Recipe:
    """One stage on models and prompts that the caller hands over; keywords replace its fields."""
    described = {
        "name": "distil",
        "train": "student",
        "teacher": "teacher" if "teacher" in models else None,
        "base": "base" if "base" in models else None,
        "method": "topk_reverse_kl",
        "options": {"k": 8, "by": "teacher", "form": "tail"},
        "data": {"path": "given.jsonl"},
        "reward": {"name": "final_number"},
        "sampling": {"max_completion_length": 14},
        "prompts_per_step": 8,
        "steps": 5,
        **stage,
    }
    kept = {key: value for key, value in described.items() if value is not None}
    return parse_recipe({"name": "pair", "models": {name: {"path": "given"} for name in models}, "stages": [kept]})


def pair_of(
    student: LanguageModel,
    teacher: LanguageModel | None,
    prompts: list[Prompt],
    *,
    base: LanguageModel | None = None,
    **stage: object,
) -> Subject:
    """A pair as `examine` builds it, or three models."""
    others = {name: lm for name, lm in (("teacher", teacher), ("base", base)) if lm is not None}
    models = {"student": student, **others}
    recipe = recipe_of(models=tuple(models), **stage)
    given = Given(models=models, prompts=prompts)
    spec = recipe.stages[0]
    return subject_of(recipe, spec, prepared_of(spec, given, 0), student, others, given, prompts=len(prompts), seed=0)


def diagnosis(
    models: Mapping[str, LanguageModel], prompts: Sequence[Prompt], *, looked_at: int = 16, **stage: Any
) -> Report:
    """What the doctor says about a pair."""
    recipe = recipe_of(models=tuple(models), **stage)
    return examine(recipe, given=Given(models=models, prompts=list(prompts)), prompts=looked_at)


def finding(report: Report, name: str) -> Finding:
    return next(finding for finding in report.findings if finding.name == name)


def all_positions(pair: Subject) -> list[bias.Positions]:
    rollouts, micros = bias.phase_a(pair)
    return list(bias.positions(pair, rollouts, micros))


def check_expected_gradient(pair: Subject) -> None:
    """In expectation over the token, the method's gradient is that of the exact reverse KL, at every position."""
    for at in all_positions(pair):
        ours = bias.expected_gradient(pair.method.signal, at)
        for i in range(len(at.rows)):
            wanted = oracle.grad_sampled_policy_gradient_mean(at.student[i].tolist(), at.teacher[i].tolist())
            assert ours[i].tolist() == pytest.approx(wanted, abs=1e-9)
