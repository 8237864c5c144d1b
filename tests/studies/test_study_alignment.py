"""The exact values of the world against finite sums and samples, and the halves that the sampler trains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.models import policy, rollout_of, sampler, tiny

from opd.models.new import character_tokenizer
from opd.rewards.registry import as_reward
from opd.types import Prompt, Sampling
from opd_studies.worlds import nearly_sorted
from opd_studies.worlds.nearly_sorted import ChosenHalf, exact_values, nearly, scores_of

PROMPT = Prompt(id=0, content="ba>", answer="ab")


@pytest.fixture(scope="module")
def lm():
    return tiny("llama", character_tokenizer("abc>"), seed=4, name="student")


@pytest.mark.parametrize(("text", "right"), [("ab", 1), ("bb", 1), ("a>", 1), ("ba", 0), ("a", 0), ("abb", 0), ("", 0)])
def test_nearly_allows_one_other_character(text: str, right: int):
    assert nearly(PROMPT, text) == right
    assert as_reward(nearly).needs == {"answer"}


def test_exact_values_equal_sum_over_right_responses(lm):
    """The sum of the probabilities of all texts of two characters that are right, at the root and after one token."""
    (values,) = exact_values(lm, [PROMPT])
    ids = dict(zip("abc>", lm.tokenizer("abc>", add_special_tokens=False).input_ids, strict=True))
    ends = lm.tokenizer.eos_token_id

    def chance(text: str, given: int) -> float:
        rollout = rollout_of(lm, PROMPT, [*(ids[c] for c in text), ends], sampling=Sampling())
        logp = policy(lm, rollout)
        return float(sum(logp[t, i] for t, i in enumerate(rollout.response_ids.tolist()) if t >= given).exp())

    texts = [a + b for a in "abc>" for b in "abc>" if nearly(PROMPT, a + b)]
    assert len(texts) == 7
    assert float(values.values[0, 0]) == pytest.approx(sum(chance(text, 0) for text in texts), rel=1e-4)
    at = values.at([])
    assert at is not None
    for first in "abc>":
        wanted = sum(chance(text, 1) for text in texts if text[0] == first)
        assert float(at[1][ids[first]]) == pytest.approx(wanted, rel=1e-4)
    assert float(at[1][ends]) == 0.0
    assert float((at[0].exp() * at[1]).sum()) == pytest.approx(float(values.values[0, 0]), rel=1e-6)
    behind = values.at([ids["c"]])
    assert behind is not None
    assert behind[1].nonzero()[:, 0].tolist() == [ids["b"]]
    assert float(behind[1][ids["b"]]) == pytest.approx(chance("cb", 2), rel=1e-4)


def test_exact_values_have_no_node_behind_two_mistakes(lm):
    (values,) = exact_values(lm, [PROMPT])
    a, b, c, _ = lm.tokenizer("abc>", add_special_tokens=False).input_ids
    assert values.at([c, c]) is None
    assert values.at([a, b, lm.tokenizer.eos_token_id]) is None
    assert values.at([lm.tokenizer.eos_token_id]) is None
    end = values.at([c, b])
    assert end is not None
    assert end[1].tolist() == [float(i == lm.tokenizer.eos_token_id) for i in range(lm.vocabulary)]


def test_exact_values_agree_with_samples(lm):
    written = sampler(lm, n=4000, max_completion_length=6)([PROMPT], seed=(0, 0))
    share = sum(nearly(PROMPT, one.text) for one in written) / 4000
    exact = float(exact_values(lm, [PROMPT])[0].values[0, 0])
    padding = sum(lm.tokenizer.pad_token_id in one.response_ids.tolist() for one in written) / 4000
    assert share == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000) + padding)


@pytest.mark.parametrize("by", ["aligned", "misaligned", "random", "alive", "kl"])
def test_chosen_half_trains_half_of_the_tokens_by_score(lm, by):
    teacher = tiny("llama", character_tokenizer("abc>"), seed=9, name="teacher")
    prompts = [PROMPT, Prompt(id=1, content="cb>", answer="bc")]
    made = ChosenHalf(own=sampler(lm, n=12, max_completion_length=4), teacher=teacher, by=by)
    rollouts = made(prompts, seed=(0, 3))
    plain = made.own(prompts, seed=(0, 3))
    assert [one.response_ids.tolist() for one in rollouts] == [one.response_ids.tolist() for one in plain]
    trained = np.concatenate([one.trained.numpy() for one in rollouts])
    scores = scores_of(lm, teacher, plain, by)
    assert trained.sum() == len(scores) // 2
    assert scores[trained].min() >= scores[~trained].max()
    assert (by == "random") == (scores.std() == 0)
    again = made(prompts, seed=(0, 3))
    assert all(torch.equal(a.trained, b.trained) for a, b in zip(rollouts, again, strict=True))


def test_scores_are_alignment_at_nodes(lm):
    teacher = tiny("llama", character_tokenizer("abc>"), seed=9, name="teacher")
    plain = sampler(lm, n=12, max_completion_length=4)([PROMPT], seed=(0, 3))
    aligned, alive = (scores_of(lm, teacher, plain, by) for by in ("aligned", "alive"))
    (values,) = exact_values(lm, [PROMPT])
    place = 0
    for one in plain:
        theirs = policy(teacher, one)
        for t in range(len(one.response_ids)):
            at = values.at(one.response_ids[:t].tolist())
            assert alive[place] == (at is not None)
            wanted = 0.0 if at is None else nearly_sorted.alignment_at(*at, theirs[t])
            assert aligned[place] == pytest.approx(wanted, abs=1e-4)
            place += 1
    assert 0 < alive.mean() < 1
