"""How a batch of responses is written: prompts read once, masks only where needed, and somebody who looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from support.models import FAMILIES, policy, prompts_of, same, sampler, tiny
from torch import Tensor

from opd.models import forward
from opd.models.language_model import LanguageModel
from opd.samplers import hf
from opd.types import NOTHING_MORE, EarlyStop, Prompt, Record, Rollout

PROMPTS = prompts_of("a", "bcdefgh", "hg", "abab")


# --- prompts are read once ------------------------------------------------------------------------------------------


class Counted:
    """Every forward of models in this test: the shape of its input, and whether it had a mask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[int, ...], bool]] = []
        original = LanguageModel.forward

        def forward(lm: LanguageModel, input_ids: Tensor, **kwargs: Any) -> Any:
            self.calls.append((tuple(input_ids.shape), kwargs.get("attention_mask") is not None))
            return original(lm, input_ids, **kwargs)

        monkeypatch.setattr(LanguageModel, "forward", forward)

    @property
    def prefill(self) -> list[tuple[int, ...]]:
        return [shape for shape, _ in self.calls if shape[1] > 1]

    @property
    def steps(self) -> list[tuple[int, ...]]:
        return [shape for shape, _ in self.calls if shape[1] == 1]

    @property
    def masked(self) -> set[bool]:
        return {mask for _, mask in self.calls}


def endless(lm: LanguageModel) -> LanguageModel:
    """The same model, with no token that ends a response."""
    return replace(lm, stop_ids=frozenset({-1}))


@pytest.mark.parametrize("n", [1, 4])
def test_sampler_reads_prompt_once_for_n_responses(n: int, monkeypatch: pytest.MonkeyPatch):
    lm = endless(tiny())
    counted = Counted(monkeypatch)
    rollouts = sampler(lm, n=n, max_completion_length=5)(prompts_of("abc", "bcd", "abc"), seed=(0, 0))
    assert len(rollouts) == 3 * n
    length = len(rollouts[0].prompt_ids)
    assert counted.prefill == [(2, length)], "two different prompts, equal ones of two rows as well"
    assert counted.steps == [(3 * n, 1)] * 4, "the last token is drawn, not read"


def test_sampler_reads_prompt_again_when_rows_are_full(monkeypatch: pytest.MonkeyPatch):
    lm = endless(tiny())
    whole = sampler(lm, n=7)(prompts_of("abc", "de"), seed=(0, 0))
    monkeypatch.setattr(hf, "ROWS", 5)
    counted = Counted(monkeypatch)
    split = sampler(lm, n=7)(prompts_of("abc", "de"), seed=(0, 0))
    assert all(same(a, b) for a, b in zip(whole, split, strict=True))
    short, long = len(whole[-1].prompt_ids), len(whole[0].prompt_ids)
    assert counted.prefill == [(1, short), (2, long), (1, long)], "5 of de; 2 of de and 3 of abc; 4 of abc"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1, 3])
def test_sampler_needs_no_mask_when_prompts_have_equal_length(family: str, n: int, monkeypatch: pytest.MonkeyPatch):
    """With a shorter prompt beside them they are padded on the left, and masked."""
    lm = tiny(family)
    prompts = [replace(p, id=i + 1) for i, p in enumerate(prompts_of("abc", "hgf", "bcd"))]
    counted = Counted(monkeypatch)
    together = sampler(lm, n=n)(prompts, seed=(3, 1), record=Record(top_k=2, entropy=True))
    assert counted.masked == {False}
    counted.calls.clear()
    padded = sampler(lm, n=n)([Prompt(id=0, content="a"), *prompts], seed=(3, 1), record=Record(top_k=2, entropy=True))
    assert counted.masked == {True}
    for a, b in zip(together, padded[n:], strict=True):
        assert same(a, b)
        assert a.student_entropy is not None
        assert b.student_entropy is not None
        torch.testing.assert_close(a.student_entropy, b.student_entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_gives_same_responses_as_row_by_row(family: str, monkeypatch: pytest.MonkeyPatch):
    lm = tiny(family)
    once = sampler(lm, n=5)(PROMPTS, seed=(0, 1))
    counted = Counted(monkeypatch)
    rows = [(p, sample) for p in PROMPTS for sample in range(5)]
    for rollout, (prompt, sample) in zip(once, rows, strict=True):
        alone = sampler(lm, n=sample + 1)([prompt], seed=(0, 1))[sample]
        assert same(rollout, alone)
    assert {shape[0] for shape in counted.prefill} == {1}


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_reads_shared_prefix_once(family: str, monkeypatch: pytest.MonkeyPatch):
    """Unless a layer sees a window only: it would be counted over the padding between the prefix and the rest."""
    lm = endless(tiny(family, seed=1))
    rule = "abcdefghhgfedcbaabababab"
    prompts = prompts_of(f"{rule}h", f"{rule}abc", f"{rule}h", f"{rule}ghgh")
    counted = Counted(monkeypatch)
    shared = sampler(lm, n=2, max_completion_length=6)(prompts, seed=(0, 0), record=Record(top_k=2))
    windows = family == "gemma2"
    beyond = len(shared[-1].prompt_ids) - len(rule)
    assert lm.sees_everything != windows
    assert counted.prefill == ([(3, len(rule) + beyond)] if windows else [(1, len(rule)), (3, beyond)])
    assert counted.steps == [(8, 1)] * 5
    monkeypatch.setattr(forward, "SHORTEST_SHARED_PREFIX", 1000)
    whole = sampler(lm, n=2, max_completion_length=6)(prompts, seed=(0, 0), record=Record(top_k=2))
    assert all(same(a, b) for a, b in zip(shared, whole, strict=True))


def test_shared_prefix_excludes_last_prompt_token(monkeypatch: pytest.MonkeyPatch):
    rule = "abcdefghhgfedcbaababab"
    lm = endless(tiny())
    counted = Counted(monkeypatch)
    rollouts = sampler(lm, max_completion_length=2)(prompts_of(rule, f"{rule}hh"), seed=(0, 0))
    length = len(rollouts[0].prompt_ids)
    assert counted.prefill == [(1, length - 1), (2, 3)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi"])
def test_student_entropy_equals_that_of_model(family: str, temperature: float, top_p: float):
    """After temperature (1 for greedy decoding), before truncation."""
    lm = tiny(family, padding_rows=3)
    for rollout in sampler(lm, n=2, temperature=temperature, top_p=top_p)(
        PROMPTS, seed=(0, 0), record=Record(entropy=True)
    ):
        log_p = policy(lm, rollout)
        assert rollout.student_entropy is not None
        assert rollout.student_top_ids is None
        expected = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(rollout.student_entropy.double(), expected, atol=1e-4, rtol=0)
    assert all(r.student_entropy is None for r in sampler(lm)(PROMPTS, seed=(0, 0), record=Record(top_k=1)))


# --- somebody looks -------------------------------------------------------------------------------------------------


@dataclass
class Watcher:
    """Keeps what it is shown, and stops a row once it has `limits[(prompt id, sample)]` tokens."""

    limits: dict[tuple[int, int], int] = field(default_factory=dict)
    shown: list[list[Rollout]] = field(default_factory=list)

    def keeps_going(self, rollouts: Sequence[Rollout]) -> list[bool]:
        self.shown.append(list(rollouts))
        return [len(r.response_ids) < self.limits.get((r.prompt.id, r.sample), 10**9) for r in rollouts]


def looked_at(
    lm: LanguageModel, watcher: Watcher, every: int, record: Record = NOTHING_MORE, **sampling: Any
) -> list[Rollout]:
    return sampler(lm, **sampling)(
        PROMPTS, seed=(0, 0), record=record, stop=EarlyStop(every=every, keeps_going=watcher.keeps_going)
    )


def begins(whole: Rollout, part: Rollout) -> bool:
    """Whether `part` is `whole` up to some token, with everything recorded of it."""
    t = len(part.response_ids)
    for name in (
        "response_ids",
        "sampler_logp",
        "policy_logp",
        "student_top_ids",
        "student_entropy",
        "trained",
        "turn",
    ):
        mine, all_of_it = getattr(part, name), getattr(whole, name)
        assert (mine is None) == (all_of_it is None)
        assert mine is None or (len(mine) == t and torch.allclose(mine.double(), all_of_it[:t].double(), atol=1e-5))
    return (part.prompt, part.sample, part.prompt_ids) == (whole.prompt, whole.sample, whole.prompt_ids)


@pytest.mark.parametrize("every", [1, 3, 4, 12, 13])
@pytest.mark.parametrize("rows", [3, 64])
def test_early_stop_sees_unfinished_responses_so_far(every: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf, "ROWS", rows)
    lm = tiny(spread=0.1)
    record = Record(top_k=2, entropy=True)
    plain = sampler(lm, n=3)(PROMPTS, seed=(0, 0), record=record)
    watcher = Watcher()
    looked = looked_at(lm, watcher, every, record, n=3)
    assert all(same(a, b) for a, b in zip(plain, looked, strict=True)), "looking changes nothing"
    assert {r.finished for r in plain} == {True, False}, "some end before their limit, some do not"

    whole = {(r.prompt.id, r.sample): r for r in plain}
    seen = [(r.prompt.id, r.sample, len(r.response_ids)) for shown in watcher.shown for r in shown]
    unfinished = [
        (*key, t)
        for key, r in whole.items()
        for t in range(every, len(r.response_ids) + 1, every)
        if t < len(r.response_ids) or not r.finished
    ]
    assert sorted(seen) == sorted(unfinished)
    for shown in watcher.shown:
        assert shown
        assert len(shown) <= rows
        assert len({len(r.response_ids) for r in shown}) == 1
        for r in shown:
            assert not r.finished
            assert begins(whole[r.prompt.id, r.sample], r)
            assert r.text == lm.tokenizer.decode(r.response_ids.tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every", [1, 2, 5])
def test_early_stop_ends_response_and_keeps_others(family: str, every: int):
    lm = endless(tiny(family))
    plain = {(r.prompt.id, r.sample): r for r in sampler(lm, n=2)(PROMPTS, seed=(0, 0))}
    limits = {(0, 1): 1, (1, 0): 4, (1, 1): 6, (3, 0): 12}
    watcher = Watcher(limits)
    stopped = {(r.prompt.id, r.sample): r for r in looked_at(lm, watcher, every, n=2)}
    for key, rollout in stopped.items():
        assert not rollout.finished
        expected = min(12, math.ceil(limits.get(key, 12) / every) * every)
        assert len(rollout.response_ids) == expected
        assert begins(plain[key], rollout)
        assert len(rollout.trained) == len(rollout.turn) == expected
    for key in limits:
        shown = [len(r.response_ids) for rows in watcher.shown for r in rows if (r.prompt.id, r.sample) == key]
        assert shown == list(range(every, len(stopped[key].response_ids) + 1, every)), "never again once it is stopped"


def test_early_stop_reads_no_more_when_all_are_stopped(monkeypatch: pytest.MonkeyPatch):
    lm = endless(tiny())
    counted = Counted(monkeypatch)
    watcher = Watcher({(p.id, 0): 1 for p in PROMPTS})
    rollouts = looked_at(lm, watcher, 3)
    assert [len(r.response_ids) for r in rollouts] == [3] * len(PROMPTS)
    assert counted.steps == [(len(PROMPTS), 1)] * 2


def test_early_stop_removes_stopped_row_from_batch(monkeypatch: pytest.MonkeyPatch):
    lm = endless(tiny())
    counted = Counted(monkeypatch)
    looked_at(lm, Watcher({(0, 0): 2, (3, 0): 4}), 2, max_completion_length=6)
    assert counted.steps == [(4, 1), (3, 1), (3, 1), (2, 1), (2, 1)]


def test_early_stop_raises_value_error_when_answers_mismatch():
    with pytest.raises(ValueError, match="zip"):
        sampler(endless(tiny()))(PROMPTS, seed=(0, 0), stop=EarlyStop(every=1, keeps_going=lambda rollouts: [True]))
