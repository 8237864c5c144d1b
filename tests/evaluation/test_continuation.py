"""The prefix-continuation probe: exact token ids, right numbers, honest counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import chain, policy, prompts_of, rollout_of, tiny

from opd.errors import ConfigError, DataError
from opd.evaluation.continuation import Transitions, continuation, prefix_of
from opd.maths.intervals import clopper_pearson
from opd.models.language_model import LanguageModel
from opd.pieces.teacher_rules import external
from opd.rewards.registry import as_reward
from opd.samplers.hf import TransformersSampler
from opd.teachers.local import LocalTeacher, local_teacher
from opd.types import NOTHING_MORE, Prompt, Record, Rollout, Sampling

GREEDY = Sampling(temperature=0.0, max_completion_length=12)


def teacher_of(lm: LanguageModel) -> LocalTeacher:
    made = local_teacher(external(), lm, lm, micro_batch_tokens=64)
    assert made is not None
    return made


def ids_of(lm: LanguageModel, text: str, *, end: bool = False) -> list[int]:
    return [*lm.tokenizer(text, add_special_tokens=False).input_ids, *([lm.tokenizer.eos_token_id] if end else [])]


@as_reward
def ends_with_h(prompt: Prompt, response: str) -> float:
    return float(response.endswith("h"))


# --- prefixes of the sampler ----------------------------------------------------------------------------------------


def test_transformers_sampler_continues_from_prefixes():
    lm = chain("abcdefgh")
    prompts = prompts_of("a", "a", "d")
    prefixes = [ids_of(lm, "ed"), [], ids_of(lm, "ga")]
    written = TransformersSampler(lm=lm, sampling=GREEDY)(prompts, seed=(0, 0), prefixes=prefixes)
    assert [r.text for r in written] == ["edefgh", "bcdefgh", "gabcdefgh"]
    for rollout, prefix in zip(written, prefixes, strict=True):
        given = len(prefix)
        assert rollout.response_ids[:given].tolist() == prefix
        assert rollout.trained.tolist() == [False] * given + [True] * (len(rollout.response_ids) - given)
        assert rollout.sampler_logp is not None
        assert rollout.sampler_logp.isnan().tolist() == (~rollout.trained).tolist()
        assert rollout.finished
        assert len(rollout.prompt_ids) == 1


def test_policy_logp_equals_unpadded_model_behind_prefix():
    """Also in a batch of rows of other lengths: log-probs are those of one unpadded row in float64.

    The first prefix has a token that no text is encoded to: it would be lost on the way through text.
    """
    lm = tiny()
    sampling = Sampling(max_completion_length=6)
    prefixes = [[3, 0, 5, 6, 7], [2], []]
    assert lm.tokenizer(lm.tokenizer.decode(prefixes[0], skip_special_tokens=True)).input_ids != prefixes[0]
    written = TransformersSampler(lm=lm, sampling=sampling)(prompts_of("a", "bcd", "h"), seed=(1, 2), prefixes=prefixes)
    for rollout, prefix in zip(written, prefixes, strict=True):
        expected = policy(lm, rollout).gather(-1, rollout.response_ids[:, None])[:, 0]
        assert rollout.policy_logp is not None
        own = slice(len(prefix), None)
        torch.testing.assert_close(rollout.policy_logp[own].double(), expected[own], atol=1e-5, rtol=1e-5)


def test_prefixes_are_neutral_when_empty_and_outside_limit():
    lm, prompts = tiny(), prompts_of("ab", "c")
    sampler = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=5))
    plain, empty = sampler(prompts, seed=(0, 1)), sampler(prompts, seed=(0, 1), prefixes=[[], []])
    assert [r.response_ids.tolist() for r in plain] == [r.response_ids.tolist() for r in empty]
    long = sampler(prompts, seed=(0, 1), prefixes=[[2] * 7, [3] * 7])
    assert max(len(r.response_ids) for r in long) == 12


def test_stop_matches_string_that_begins_in_prefix():
    lm = chain("abcdefgh")
    sampling = replace(GREEDY, stop=("de",))
    (rollout,) = TransformersSampler(lm=lm, sampling=sampling)(
        prompts_of("a"), seed=(0, 0), prefixes=[ids_of(lm, "bcd")]
    )
    assert rollout.text == "bcde"
    assert rollout.finished


def test_transformers_sampler_refuses_record_with_prefixes():
    sampler = TransformersSampler(lm=tiny(), sampling=GREEDY)
    assert Record(top_k=2) != NOTHING_MORE
    with pytest.raises(AssertionError, match="not drawn"):
        sampler(prompts_of("a"), seed=(0, 0), record=Record(top_k=2), prefixes=[[3]])


# --- cutting --------------------------------------------------------------------------------------------------------


def test_prefix_of_cuts_at_token_count_or_share():
    lm = chain("abcdefgh")
    rollout = rollout_of(lm, prompts_of("a")[0], ids_of(lm, "bcdefgh", end=True))
    ids = rollout.response_ids.tolist()
    stop = lm.stop_ids
    assert prefix_of(rollout, 0, stop) == prefix_of(rollout, 0.0, stop) == ()
    assert prefix_of(rollout, 3, stop) == tuple(ids[:3])
    assert prefix_of(rollout, 0.5, stop) == tuple(ids[:3])  # of 7 tokens: the end token is none of them
    assert prefix_of(rollout, 1.0, stop) == prefix_of(rollout, 7, stop) == tuple(ids[:7])
    assert prefix_of(rollout, 8, stop) is None
    assert prefix_of(rollout, 1, stop) == tuple(ids[:1])  # an int counts tokens


# --- the probe ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lm() -> LanguageModel:
    """Says the rest of the alphabet up to h. Every letter leads to the next, and h to the end."""
    return chain("abcdefgh")


def student_rollouts(lm: LanguageModel) -> list[Rollout]:
    """Two that the teacher can still finish at any depth, and two that said h at once, behind which comes the end."""
    prompts = prompts_of("a", "b", "c", "d")
    texts = ["bcd", "cdefgh", "hd", "hdh"]
    made = [rollout_of(lm, p, ids_of(lm, text, end=True)) for p, text in zip(prompts, texts, strict=True)]
    return [replace(rollout, text=text) for rollout, text in zip(made, texts, strict=True)]


@as_reward
def right_length(prompt: Prompt, response: str) -> float:
    """Right when the letters go up by one from the prompt's to h."""
    letters = "abcdefgh"
    start = letters.index(str(prompt.content)) + 1
    return float(response == letters[start:])


def test_continuation_counts_transitions_by_depth(lm: LanguageModel):
    found = continuation(teacher_of(lm), student_rollouts(lm), [0, 0.5, 3, 50], right_length, sampling=GREEDY)
    assert (found.alone.mean, found.student.mean) == (1.0, 0.25)
    assert (found.alone.low, found.alone.high) == pytest.approx(clopper_pearson(1.0, 4))
    assert found.unreached == (50,)
    start, half, three = found.depths
    # From the prompt it is the teacher alone.
    assert (start.continuing.mean, start.change, start.prefix_length) == (1.0, 0.0, 0.0)
    # Half of "bcd" and of "cdefgh" is on its way; "h" (half of "hd" and of "hdh") ends it.
    assert half.transitions == Transitions(right_right=2, right_wrong=2, wrong_right=0, wrong_wrong=0)
    assert (half.continuing.mean, half.student.mean, half.gain, half.change) == (0.5, 0.25, 0.25, -0.5)
    assert (half.continuing.low, half.continuing.high) == pytest.approx(clopper_pearson(0.5, 4))
    assert half.prefix_length == (1 + 3 + 1 + 1) / 4
    # "hd" has two tokens: left out, and counted.
    assert (three.responses, three.too_short) == (3, 1)
    assert three.transitions == Transitions(right_right=2, right_wrong=1, wrong_right=0, wrong_wrong=0)
    assert three.student.mean == pytest.approx(1 / 3)
    assert three.finished_share == 1.0


def test_continuation_counts_wrong_right_when_prefix_helps(lm: LanguageModel):
    """The other column of the table: the prompt's letter leads nowhere, the student's prefix does."""
    rollouts = [rollout_of(lm, prompts_of("h")[0], ids_of(lm, "fgh", end=True))]
    found = continuation(teacher_of(lm), rollouts, [1, 3], ends_with_h, sampling=GREEDY)
    assert found.alone.mean == 0.0
    assert found.depths[0].transitions == Transitions(right_right=0, right_wrong=0, wrong_right=1, wrong_wrong=0)
    assert found.depths[0].change == 1.0


def test_continuation_counts_one_prompt_for_two_responses(lm: LanguageModel):
    """Two responses of one prompt are one prompt in the interval; the teacher alone is asked once."""
    rollouts = [rollout_of(lm, prompts_of("a")[0], ids_of(lm, text)) for text in ("bcd", "h")]
    found = continuation(teacher_of(lm), rollouts, [0.5], ends_with_h, sampling=GREEDY)
    assert found.alone.mean == 1.0
    assert (found.alone.low, found.alone.high) == pytest.approx(clopper_pearson(1.0, 1))
    assert found.depths[0].responses == 2


def test_continuation_rewards_prompt_when_contexts_are_given(lm: LanguageModel):
    prompt = replace(prompts_of("a")[0], answer="x")
    rollouts = [rollout_of(lm, prompt, ids_of(lm, "b"))]
    seen: list[Prompt] = []

    @as_reward
    def reward(prompt: Prompt, response: str) -> float:
        seen.append(prompt)
        return float(response == "fgh")

    found = continuation(
        teacher_of(lm), rollouts, [0], reward, sampling=GREEDY, contexts=[replace(prompt, content="e")]
    )
    assert found.depths[0].continuing.mean == 1.0
    assert {p.content for p in seen} == {"a"}


def test_continuation_is_reproducible_when_seed_is_equal(lm: LanguageModel):
    other = tiny()
    rollouts = [rollout_of(other, p, [3, 4, 5, 6]) for p in prompts_of("a", "b", "c", "d", "e", "f")]
    sampling = Sampling(max_completion_length=4)

    @as_reward
    def c_later(prompt: Prompt, response: str) -> float:
        return float("c" in response[2:])

    def probe(seed: int):
        return continuation(teacher_of(other), rollouts, [2], c_later, sampling=sampling, seed=seed)

    assert probe(3) == probe(3)
    assert len({probe(seed).depths[0].continuing.mean for seed in range(6)}) > 1


def test_continuation_refuses_bad_arguments(lm: LanguageModel):
    teacher, rollouts = teacher_of(lm), student_rollouts(lm)
    with pytest.raises(DataError, match="needs responses of the student, and got none"):
        continuation(teacher, [], [1], ends_with_h, sampling=GREEDY)
    for bad in ([1.5], [-1], [True], []):
        with pytest.raises(ConfigError, match=r"A depth is a number of tokens .* or a share .*; got"):
            continuation(teacher, rollouts, bad, ends_with_h, sampling=GREEDY)
    with pytest.raises(ConfigError, match=r"one continuation per prefix, and sampling\.n is 2"):
        continuation(teacher, rollouts, [1], ends_with_h, sampling=replace(GREEDY, n=2))
    with pytest.raises(ConfigError, match=r"the reward gave 0\.3 on prompt 0. Use a reward that is 0 or 1"):
        continuation(teacher, rollouts, [1], as_reward(lambda prompt, response: 0.3), sampling=GREEDY)
    far = [rollout_of(lm, prompts_of("a")[0], [3] * 300)]
    with pytest.raises(DataError, match="would read 301 tokens in all, but has only 256 positions"):
        continuation(teacher, far, [300], ends_with_h, sampling=GREEDY)
