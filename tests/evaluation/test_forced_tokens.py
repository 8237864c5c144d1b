"""Rewards after forced tokens against the sum over all responses of a tiny model."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from support.models import double, full_logits, prompts_of, tiny

from opd.errors import ConfigError
from opd.evaluation.forced_tokens import continuations, rewards_after
from opd.evaluation.response_tree import Node
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.rewards.registry import as_reward
from opd.types import Prompt, Sampling

LONGEST = 3
VISITS = 400
PROMPT = prompts_of("ab")[0]


@as_reward
def has_letters_in_order(prompt: Prompt, response: str) -> float:
    return float(response == "".join(sorted(response)) and len(response) > 1)


@cache
def model() -> LanguageModel:
    return tiny(seed=5)


def node(prefix: tuple[int, ...], ids: list[int], prompt: Prompt = PROMPT) -> Node:
    lm = model()
    nothing = torch.zeros(len(ids), dtype=torch.float64)
    return Node(
        prompt=prompt,
        prompt_ids=tuple(render(prompt, lm.tokenizer)),
        prefix=prefix,
        ids=torch.tensor(ids),
        student_logp=nothing,
        teacher_logp={},
    )


def exact(prefix: tuple[int, ...], temperature: float = 1.0) -> float:
    """The mean reward of all responses that begin so."""
    lm, given = model(), len(prefix)
    ends, net = lm.tokenizer.eos_token_id, double(lm)
    prompt_ids = render(PROMPT, lm.tokenizer)
    if prefix[-1] == ends or given == LONGEST:
        return reward_of(prefix)
    total = 0.0
    for rest in itertools.product(range(lm.vocabulary), repeat=LONGEST - given):
        if ends in rest[:-1]:
            cut = rest.index(ends) + 1
            if any(token != 0 for token in rest[cut:]):  # one representative of the responses that end there
                continue
            rest = rest[:cut]
        ids = (*prefix, *rest)
        logits = full_logits(net, prompt_ids, torch.tensor(ids), lm.vocabulary)
        logp = (logits / temperature).log_softmax(-1)
        p = float(sum(logp[t, token] for t, token in enumerate(ids) if t >= given).detach().exp())
        total += p * reward_of(ids)
    return total


def reward_of(ids: tuple[int, ...]) -> float:
    return has_letters_in_order.value(PROMPT, model().tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rewards_after_estimate_sum_over_all_responses(temperature: float):
    ends = model().tokenizer.eos_token_id
    # After two tokens one is left to force, after which the response is at its limit: no continuation is written.
    given = [node((3,), [2, 3, 5, ends]), node((3, 4), [5, 2, ends])]
    sampling = Sampling(max_completion_length=LONGEST, temperature=temperature)
    said: list[int] = []
    found = rewards_after(
        model(), given, has_letters_in_order, sampling=sampling, visits=VISITS, seed=0, done=said.append
    )
    for one, rewards in zip(given, found, strict=True):
        assert rewards.shape == (len(one.ids), VISITS)
        for token, row in zip(one.ids.tolist(), rewards, strict=True):
            wanted = exact((*one.prefix, token), temperature)
            spread = (wanted * (1 - wanted) / VISITS) ** 0.5
            assert float(row.mean()) == pytest.approx(wanted, abs=4 * spread + 1e-9)
    assert 0 < found[0].mean() < 1
    assert said[-1] == continuations(given, VISITS) == 7 * VISITS


def test_rewards_after_are_function_of_seed():
    sampling = Sampling(max_completion_length=LONGEST)
    given = [node((), [2, 3]), node((3,), [4, 5])]
    both = rewards_after(model(), given, has_letters_in_order, sampling=sampling, visits=40, seed=1)
    alone = rewards_after(model(), given[1:], has_letters_in_order, sampling=sampling, visits=40, seed=1)
    other = rewards_after(model(), given[1:], has_letters_in_order, sampling=sampling, visits=40, seed=2)
    assert both[1].tolist() == alone[0].tolist() != other[0].tolist()


def test_rewards_after_write_nothing_behind_stop_string():
    sampling = Sampling(max_completion_length=8, stop=("bc",))
    b, c, d = model().tokenizer("bcd", add_special_tokens=False).input_ids
    (found,) = rewards_after(model(), [node((b,), [c, d])], has_letters_in_order, sampling=sampling, visits=50, seed=0)
    assert found[0].tolist() == [1.0] * 50
    assert 0 < found[1].mean() < 1


def test_rewards_after_refuse_fractional_reward():
    half = as_reward(lambda prompt, response: 0.5, name="half")
    with pytest.raises(ConfigError, match=r"the reward 'half' gave 0.5 on prompt 0. Use a reward that is 0 or 1"):
        rewards_after(model(), [node((), [2, 3])], half, sampling=Sampling(), visits=10, seed=0)
