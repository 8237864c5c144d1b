"""Conversations of a batch are those of each row alone, and what the environment says is read and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.exactness import log_probs, relative
from support.models import byte_tokenizer, gradient_of, prompts_of, same, step, teacher_of, tiny
from torch import Tensor

from opd import methods
from opd.environments.acting import Limits
from opd.environments.conversations import ConversationSampler, Rules
from opd.environments.protocol import Begun, Environment, Observation, Seed, Turn
from opd.errors import DataError
from opd.loss.step import scored
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.pieces.normalise import per
from opd.samplers.hf import TransformersSampler, uniforms_of
from opd.types import EarlyStop, Prompt, Record, Rollout, Sampling, Scores, Teacher

PROMPTS = ("abc", "hgfedcbahgfedcbahgfedcba", "d", "efef")


@dataclass(frozen=True, slots=True)
class Echo(Environment):
    """Says `says` from its own random numbers after each turn, and ends after some turns, by its seed."""

    rewards: bool = True
    role: str = "user"
    says: str = "bcd"

    def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
        return Begun(state={"left": sum(seed) % 4 + 1, "seed": seed})

    def act(self, state: Any, turn: Turn) -> Observation:
        state["left"] -= 1
        given = 0.5 if state["left"] == 1 else None
        return Observation(text=self.says * (1 + state["left"]), role=self.role, reward=given, done=state["left"] == 0)


def conversations(lm: LanguageModel, environment: Environment | None = None, **given: Any) -> ConversationSampler:
    """Turns end with the letter a; at most 60 tokens."""
    rules = Rules(environment=environment or Echo(), **{key: given.pop(key) for key in list(given) if key in RULES})
    sampling = Sampling(**{"max_completion_length": 60, "n": 2, "stop": ("a", "e"), **given})
    return ConversationSampler(
        inner=TransformersSampler(lm=lm, sampling=sampling), lm=lm, sampling=sampling, rules=rules
    )


RULES = ("max_turns", "max_turn_length", "limits", "format", "keeps_rewritten")


def led(lm: LanguageModel, *texts: str, seed: tuple[int, int] = (3, 1), **given: Any) -> list[Rollout]:
    return conversations(lm, **given)(prompts_of(*(texts or PROMPTS)), seed=seed)


def heard(rollout: Rollout) -> Tensor:
    assert rollout.talk is not None
    return rollout.talk.heard


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return tiny(seed=1, spread=0.3)


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return tiny(seed=2, spread=0.3)


@pytest.fixture(scope="module")
def rollouts(student: LanguageModel) -> list[Rollout]:
    return led(student)


def test_conversations_have_turns_and_environment_tokens(student: LanguageModel, rollouts: list[Rollout]):
    turns = [int(one.turn.max()) + 1 for one in rollouts]
    assert len(set(turns)) >= 3
    for one in rollouts:
        assert one.talk is not None
        assert one.trained.tolist() == (~heard(one)).tolist()
        assert bool((one.turn.diff() >= 0).all())
        assert one.talk.counts["turns"] == len(one.talk.turn_rewards) == int(one.turn.max()) + 1
        said = student.tokenizer.decode(one.response_ids[heard(one)])
        assert set(said) <= set("bcd")
        # The environment speaks first in every turn but the first.
        for turn in range(1, int(one.turn.max()) + 1):
            of_turn = heard(one)[one.turn == turn].tolist()
            assert of_turn == sorted(of_turn, reverse=True)
            assert of_turn[0]
        assert one.reward == sum(value or 0 for value in one.talk.turn_rewards)


@dataclass(frozen=True, slots=True)
class Fails(Echo):
    """Fails in every second turn, by an exception, and counts two failed calls in the third."""

    def act(self, state: Any, turn: Turn) -> Observation:
        state["turns"] = state.get("turns", 0) + 1
        if state["turns"] % 2 == 0:
            raise ValueError
        return Observation(text="b", counts={"tool_errors": 2} if state["turns"] == 3 else {})


def test_failures_are_counted_by_turn(student: LanguageModel):
    talks = [one.talk for one in led(student, environment=Fails(), max_turns=4, limits=Limits(error="c"))]
    assert any(talk is not None and len(talk.turn_errors) == 4 for talk in talks)
    for talk in talks:
        assert talk is not None
        assert len(talk.turn_errors) == len(talk.turn_rewards)
        acted = len(talk.turn_errors) - int(talk.counts["token_limit"])  # a turn that is cut is not acted on
        assert talk.turn_errors[:acted] == (0, 1, 2, 1)[:acted]
        assert sum(talk.turn_errors) == talk.counts["errors"] + talk.counts["tool_errors"]


def test_log_probs_equal_forward_of_each_row_alone(student: LanguageModel, rollouts: list[Rollout]):
    for one in rollouts:
        assert one.policy_logp is not None
        assert one.sampler_logp is not None
        with torch.no_grad():
            expected = log_probs(student, one).gather(-1, one.response_ids[:, None])[:, 0]
        assert torch.isnan(one.policy_logp[heard(one)]).all()
        assert torch.isnan(one.sampler_logp[heard(one)]).all()
        assert (one.policy_logp - expected)[~heard(one)].abs().max() <= 1e-5


def test_conversation_in_batch_equals_it_alone(student: LanguageModel, rollouts: list[Rollout]):
    sampler = conversations(student)
    for i, prompt in enumerate(prompts_of(*PROMPTS)):
        alone = sampler([prompt], seed=(3, 1))
        for one, other in zip(alone, rollouts[2 * i : 2 * i + 2], strict=True):
            assert same(replace(one, policy_logp=known(one)), replace(other, policy_logp=known(other)))
            assert one.turn.tolist() == other.turn.tolist()
            assert one.talk is not None
            assert other.talk is not None
            assert dict(one.talk.counts) == dict(other.talk.counts)


def known(rollout: Rollout) -> Tensor:
    assert rollout.policy_logp is not None
    return rollout.policy_logp[~heard(rollout)]


def test_first_turn_equals_plain_sampler(student: LanguageModel, rollouts: list[Rollout]):
    plain = conversations(student).inner(prompts_of(*PROMPTS), seed=(3, 1))
    for one, other in zip(plain, rollouts, strict=True):
        assert one.response_ids.tolist() == other.response_ids[other.turn == 0].tolist()


def test_uniforms_of_turns_differ_and_are_fixed():
    drawn = [tuple(uniforms_of((3, 1), 7, 0, 4, turn).tolist()) for turn in range(5)]
    assert len(set(drawn)) == 5
    assert drawn[0] == tuple(uniforms_of((3, 1), 7, 0, 4).tolist())
    assert drawn[3] == tuple(uniforms_of((3, 1), 7, 0, 9, 3).tolist()[:4])


def test_records_cover_own_tokens(student: LanguageModel, rollouts: list[Rollout]):
    kept = conversations(student)(prompts_of(*PROMPTS), seed=(3, 1), record=Record(top_k=3, entropy=True))
    for one, other in zip(kept, rollouts, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.student_top_ids is not None
        assert one.student_entropy is not None
        with torch.no_grad():
            logp = log_probs(student, one)
        own = ~heard(one)
        assert torch.equal(one.student_top_ids[own], logp.topk(3).indices[own])
        entropy = -(logp.exp() * logp).sum(-1)
        assert (one.student_entropy - entropy)[own].abs().max() <= 1e-5
        assert torch.isnan(one.student_entropy[~own]).all()


# --- the step ---------------------------------------------------------------------------------------------------------


def own_gradient(student: LanguageModel, teacher: LanguageModel, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """The gradient of the mean of KL(p || q) over the student's tokens of all rows, each row alone, by autograd."""
    total = sum(int((~heard(one)).sum()) for one in rollouts)
    for one in rollouts:
        p = log_probs(student, one)
        with torch.no_grad():
            q = log_probs(teacher, one)
        kl = (p.exp() * (p - q)).sum(-1)
        (kl[~heard(one)].sum() / total).backward()
    grads = {name: p.grad.clone() for name, p in student.trainable().items() if p.grad is not None}
    student.model.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("micro_batch_tokens", [10**6, 70])
def test_gradient_equals_that_of_each_row_alone(
    student: LanguageModel, teacher: LanguageModel, rollouts: list[Rollout], micro_batch_tokens: int
):
    method = methods.build("reverse_kl", {"average": "token"})
    got = step(method, student, teacher_of(method, student, teacher), rollouts, micro_batch_tokens)
    assert relative(got.grads, own_gradient(student, teacher, rollouts)) <= 1e-5


class Blind(Teacher):
    """Another teacher's scores, but `value` at the environment's tokens."""

    def __init__(self, inner: Teacher, value: float):
        self.inner, self.value = inner, value

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: Any) -> list[Scores]:
        found = self.inner.score(rollouts, contexts, request)
        return [replace(one, teacher_logp=self._hidden(one, r)) for one, r in zip(found, rollouts, strict=True)]

    def _hidden(self, scores: Scores, rollout: Rollout) -> Tensor:
        return scores.teacher_logp.masked_fill(heard(rollout), self.value)


@pytest.mark.parametrize(
    ("name", "options"), [("opd", {}), ("opd", {"gamma": 0.9}), ("iw_opd", {}), ("top_d", {}), ("grpo", {})]
)
@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_environment_tokens_have_no_part_in_a_step(
    student: LanguageModel,
    teacher: LanguageModel,
    rollouts: list[Rollout],
    name: str,
    options: Mapping[str, Any],
    value: float,
):
    """Whatever is known of them, the gradient has the same bits, and the denominator counts the student's tokens."""
    method = methods.build(name, {"average": "token", **options} if name in ("opd", "iw_opd") else options)
    scorer = teacher_of(method, student, teacher)
    plain = step(method, student, scorer, rollouts)
    assert plain.norm > 0
    changed = [
        replace(
            one,
            policy_logp=None if one.policy_logp is None else one.policy_logp.masked_fill(heard(one), value),
            sampler_logp=None if one.sampler_logp is None else one.sampler_logp.masked_fill(heard(one), value),
        )
        for one in rollouts
    ]
    assert step(method, student, Blind(scorer, value), changed).same_bits(plain)


@pytest.mark.parametrize("what", ["token", "sequence", 60])
def test_denominator_counts_own_tokens(student: LanguageModel, rollouts: list[Rollout], what: Any):
    method = replace(methods.build("grpo", {}), normalise=per(what))
    contexts = [one.prompt for one in rollouts]
    phase = scored(method, teacher_of(method, student, None), rollouts, contexts, method.request(), student.device)
    own = [int((~heard(one)).sum()) for one in rollouts]
    expected = {"token": sum(own), "sequence": len(own), 60: 60 * len(own)}[what]
    assert phase.count == expected
    for i, one in enumerate(rollouts):
        share = phase.denominator.share[i, : len(one.response_ids)]
        assert (share[heard(one)] == 0).all()
        assert torch.allclose(share[~heard(one)], torch.tensor(1 / own[i] if what == "sequence" else 1.0))


def test_gradient_of_environment_logits_is_zero(
    student: LanguageModel, teacher: LanguageModel, rollouts: list[Rollout]
):
    """The rows of the head get no gradient from ids that only the environment's tokens would bring."""
    method = methods.build("sft", {})
    one = next(r for r in rollouts if bool(heard(r).any()))
    marked = replace(one, trained=torch.zeros_like(one.trained))
    phase = scored(
        method, teacher_of(method, student, None), [one, marked], [one.prompt] * 2, method.request(), student.device
    )
    alone = scored(method, teacher_of(method, student, None), [one], [one.prompt], method.request(), student.device)
    both = gradient_of(method, student, teacher_of(method, student, None), phase.batch, phase.denominator)
    assert both.same_bits(
        gradient_of(method, student, teacher_of(method, student, None), alone.batch, alone.denominator)
    )


# --- limits -----------------------------------------------------------------------------------------------------------


def counts(rollout: Rollout) -> Mapping[str, float]:
    assert rollout.talk is not None
    return rollout.talk.counts


class Talker(Environment):
    """Never ends."""

    def act(self, state: Any, turn: Turn) -> Observation:
        return Observation(text="bc")


def test_turn_limit_ends_conversation(student: LanguageModel):
    for one in led(student, environment=Talker(), max_turns=3, max_completion_length=200):
        assert int(one.turn.max()) == 2
        assert counts(one)["turn_limit"] == 1
        assert not one.finished
        assert not heard(one)[-1]  # what is said after the last turn is read by no one
        assert one.reward is None


def test_token_limit_holds_for_all_tokens_together(student: LanguageModel):
    found = led(student, environment=Talker(), max_turns=50, max_completion_length=30)
    assert all(len(one.response_ids) <= 30 for one in found)
    assert all(counts(one)["token_limit"] == 1 and not one.finished for one in found)
    assert all(not heard(one)[-1] for one in found)


def test_token_limit_of_a_turn_ends_conversation(student: LanguageModel):
    found = led(student, environment=Talker(), max_turn_length=4, stop=())
    for one in found:
        assert counts(one)["token_limit"] == 1
        lengths = [int(((one.turn == turn) & ~heard(one)).sum()) for turn in range(int(one.turn.max()) + 1)]
        assert max(lengths) <= 4


def test_early_stop_sees_whole_conversations(student: LanguageModel):
    seen: list[Rollout] = []

    def keeps_going(unfinished: Sequence[Rollout]) -> list[bool]:
        seen.extend(unfinished)
        return [int(one.turn.max()) < 2 for one in unfinished]

    sampler = conversations(student, Talker(), max_completion_length=100)
    found = sampler(prompts_of(*PROMPTS), seed=(3, 1), stop=EarlyStop(every=3, keeps_going=keeps_going))
    ended = {(one.prompt.id, one.sample): one for one in found}
    assert any(int(one.turn.max()) > 0 for one in seen)
    assert any(counts(one)["stopped"] for one in found)
    for one in seen:
        whole = ended[one.prompt.id, one.sample]
        n = len(one.response_ids)
        assert one.response_ids.tolist() == whole.response_ids[:n].tolist()
        assert one.trained.tolist() == whole.trained[:n].tolist()


# --- a chat -----------------------------------------------------------------------------------------------------------


def test_chat_ids_are_extended_by_the_template():
    lm = tiny(tokenizer=byte_tokenizer(), seed=3, spread=0.2)
    prompts = [Prompt(id=i, content=({"role": "user", "content": text},)) for i, text in enumerate(("hi", "hello"))]
    sampler = conversations(lm, Echo(says="ok"), max_completion_length=200, stop=("e",))
    found = sampler(prompts, seed=(0, 0))
    assert any(int(one.turn.max()) for one in found)
    for one in found:
        texts = [
            lm.tokenizer.decode(one.response_ids[(one.turn == turn) & heard(one)])
            for turn in range(1, int(one.turn.max()) + 1)
        ]
        assert all(text.startswith("<user>ok") and text.endswith("<assistant>") for text in texts), texts
        assert counts(one)["rewritten"] == counts(one)["refused"] == 0
        assert one.prompt_ids == tuple(render(one.prompt, lm.tokenizer))


def test_begin_that_raises_names_the_row(student: LanguageModel):
    class Broken(Environment):
        name = "broken"

        def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
            raise KeyError("word")

        def act(self, state: Any, turn: Turn) -> Observation:
            return Observation()

    with pytest.raises(DataError, match=r"environment 'broken' cannot begin prompt 0: KeyError: 'word'.*leave the row"):
        led(student, environment=Broken())


def test_state_is_ended_however_the_conversation_ends(student: LanguageModel):
    ended: list[Any] = []

    class Counted(Echo):
        def end(self, state: Any) -> None:
            ended.append(state["seed"])

    led(student, environment=Counted(), max_completion_length=8)
    assert sorted(ended) == [(3, 1, prompt, sample) for prompt in range(4) for sample in range(2)]


@pytest.mark.parametrize("raised", [ValueError("closed twice"), SystemExit(3)])
def test_end_that_raises_is_counted_and_ends_no_run(student: LanguageModel, raised: BaseException):
    class Stuck(Echo):
        def end(self, state: Any) -> None:
            raise raised

    found, plain = led(student, environment=Stuck()), led(student, environment=Echo())
    for one, other in zip(found, plain, strict=True):
        assert counts(one)["errors"] == counts(other)["errors"] + 1
        assert torch.equal(one.response_ids, other.response_ids)


def test_states_are_ended_where_a_later_prompt_cannot_begin(student: LanguageModel):
    ended: list[int] = []

    class Half(Echo):
        def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
            if seed[2] == 2:
                raise KeyError("word")
            return super().begin(prompt, seed=seed)

        def end(self, state: Any) -> None:
            ended.append(state["seed"][2])

    with pytest.raises(DataError, match="cannot begin prompt 2"):
        led(student, environment=Half())
    assert ended == [0, 0, 1, 1]


def test_observation_is_cut_and_cleaned_of_control_codes(student: LanguageModel):
    class Loud(Environment):
        def act(self, state: Any, turn: Turn) -> Observation:
            return Observation(text="b\x1b[2Jc<eos>" + "d" * 10**6)

    found = led(student, environment=Loud(), max_turns=2, limits=Limits(characters=20), max_completion_length=200)
    for one in found:
        assert counts(one)["cut"] == counts(one)["cleaned"] == 1
        assert int(heard(one).sum()) < 80
        assert student.tokenizer.eos_token_id not in one.response_ids[heard(one)].tolist()
