"""Away from the teacher: what that ascends, solutions of peers, the gate with its memory, what is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import oracle
import pytest
import torch
from support.models import rollout_of, tiny
from support.runs import one_stage, prepare, tiny_model
from torch import Tensor

import opd
from opd import methods
from opd.errors import ConfigError, DataError
from opd.maths import divergences
from opd.method import Method
from opd.methods.coherence import Facts, check_coherence
from opd.pieces import contexts, credit, perplexity_gate, signals, solutions, supports
from opd.pieces.gates import EntropyGate
from opd.pieces.needs import Input, Reads, needs_of
from opd.pieces.perplexity_gate import PerplexityGate, Settings
from opd.pieces.solutions import Solutions, from_peers
from opd.types import Batch, Prompt, Rollout

LM = tiny()
PROMPT = Prompt(id=4, content="ab", answer=7, privileged_context="hg")
ALL: Solutions = lambda rollouts: ["x"] * len(rollouts)  # noqa: E731


def response(sample: int, reward: float | None, text: str = "", prompt: Prompt = PROMPT) -> Rollout:
    written = rollout_of(LM, PROMPT, [4, 5], sample=sample, reward=reward)
    return replace(written, prompt=prompt, text=text or f"r{sample}")


def batch_of(
    teacher_logp: Tensor,
    policy_logp: Tensor,
    rewards: Sequence[float] | None = None,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Batch:
    """Responses to one prompt, [B, T]."""
    rewards = [0.0] * len(teacher_logp) if rewards is None else rewards
    return Batch(
        rollouts=tuple(response(i, reward) for i, reward in enumerate(rewards)),
        response_ids=torch.zeros(teacher_logp.shape, dtype=torch.long),
        mask=torch.ones(teacher_logp.shape, dtype=torch.bool) if mask is None else mask,
        sampler_logp=policy_logp,
        policy_logp=policy_logp,
        teacher_logp=teacher_logp,
        reward=torch.tensor(rewards, dtype=teacher_logp.dtype),
        group=torch.zeros(len(rewards), dtype=torch.long),
        teacher_entropy=entropy,
    )


def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the shape -------------------------------------------------------------------------------------------------------


def ascent(strength: float = 1.0, shape: Literal["jsd", "reverse_kl"] = "jsd") -> Any:
    return credit.diverge_from_teacher(strength, ALL, shape=shape)


def of_ratio(u: Tensor, **settings: Any) -> Tensor:
    """The credit of log-ratios u, [n]."""
    return ascent(**settings)(batch_of(u[:, None], torch.zeros_like(u)[:, None]))[:, 0]


@pytest.mark.parametrize("shape", ["jsd", "reverse_kl"])
def test_diverge_from_teacher_equals_oracle(shape: Literal["jsd", "reverse_kl"]):
    u = torch.tensor([-1e4, -30.0, -2.0, -1e-3, 0.0, 1e-3, 0.7, 5.0, 60.0, 1e4], dtype=torch.float64)
    expected = [oracle.anti_advantage(value, 0.0, 0.5, shape) for value in u.tolist()]
    assert of_ratio(u, strength=0.5, shape=shape).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_diverge_from_teacher_is_bounded_and_falls_with_ratio():
    """Lemma 5: at most (log 2) / 2, reached where the teacher thinks nothing of a token; -u/4 near 0, -u/2 far out."""
    u = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    got = of_ratio(u)
    assert bool((got.diff() < 0)[u[1:].abs() < 30].all())
    assert bool((got.sign() == -u.sign())[u.abs() > 1e-9].all())
    assert float(got.max()) == pytest.approx(math.log(2) / 2, abs=1e-12)
    assert float(of_ratio(torch.tensor([1e-6], dtype=torch.float64))) == pytest.approx(-0.25e-6, rel=1e-5)
    assert float(got[-1]) == pytest.approx(-0.5 * (60 - math.log(2)), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", ["jsd", "reverse_kl"])
def test_diverge_from_teacher_ascends_divergence_in_mean(seed: int, shape: Literal["jsd", "reverse_kl"]):
    """Every token of the vocabulary, weighted by its probability, against autograd in float64 (eq. 3, 5 and 6)."""
    z, q = logits(seed, 9).requires_grad_(), logits(seed + 50, 9).log_softmax(-1)
    p = z.log_softmax(-1)
    advantage = ascent(shape=shape)(batch_of(q[:, None], p.detach()[:, None]))[:, 0]
    (got,) = torch.autograd.grad((p.detach().exp() * advantage * p).sum(), z, retain_graph=True)
    if shape == "jsd":
        value = divergences.generalised_jsd(p, q, beta=0.5)
        by_hand = oracle.grad_jsd(z.tolist(), q.tolist())
    else:
        value = divergences.reverse_kl(p, q)
        by_hand = oracle.grad_full(z.tolist(), q.tolist())
    (expected,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    assert got.tolist() == pytest.approx(by_hand, abs=1e-12)


def test_diverge_from_teacher_telescopes_to_log_posterior_ratio():
    """Lemma 3 on a made-up world of 3 contexts and responses of 4 tokens: sum u = log p(c | y) - log p(c)."""
    contexts_, vocabulary, length = 3, 3, 4
    joint = logits(7, contexts_, *[vocabulary] * length).flatten().softmax(0)
    joint = joint.view(contexts_, *[vocabulary] * length)
    prior = joint.reshape(contexts_, -1).sum(1)
    for y in itertools.product(range(vocabulary), repeat=length):
        reached = [joint[(slice(None), *y[:t])].reshape(contexts_, -1).sum(1) for t in range(length + 1)]  # p(c, y_<=t)
        for c in range(contexts_):
            teacher = torch.stack([(reached[t + 1][c] / reached[t][c]).log() for t in range(length)])
            policy = torch.stack([(reached[t + 1].sum() / reached[t].sum()).log() for t in range(length)])
            u = -ascent(shape="reverse_kl")(batch_of(teacher[None], policy[None]))
            expected = (reached[length][c] / reached[length].sum()).log() - prior[c].log()
            assert float(u.sum()) == pytest.approx(float(expected), abs=1e-12)


def test_diverge_from_teacher_is_zero_when_masked_or_unsolved():
    teacher, policy = logits(0, 3, 4), logits(1, 3, 4)
    teacher[0, 3] = policy[0, 3] = math.nan  # padding
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 3] = mask[1, 1] = False
    only = credit.diverge_from_teacher(0.5, lambda rollouts: ["x", "x", None])
    got = only(batch_of(teacher, policy, mask=mask))
    assert got[~mask].tolist() == [0.0, 0.0]
    assert got[2].tolist() == [0.0] * 4
    for row, step in ((0, 0), (0, 2), (1, 0), (1, 3)):
        u = float(teacher[row, step] - policy[row, step])
        assert float(got[row, step]) == pytest.approx(oracle.anti_advantage(u, 0.0, 0.5))


# --- credits that combine --------------------------------------------------------------------------------------------


def test_credit_add_sums_and_scale_multiplies():
    batch = batch_of(logits(0, 2, 3), logits(1, 2, 3), rewards=[1.0, 0.0])
    both = credit.add(credit.group_reward(), credit.scale(-0.5, credit.discounted(0.0)))
    reward = oracle.group_advantage([1.0, 0.0])
    expected = [
        [reward[row] - 0.5 * float(batch.teacher_logp[row, t] - batch.policy_logp[row, t]) for t in range(3)]
        for row in range(2)
    ]
    assert both(batch).tolist() == [pytest.approx(row) for row in expected]
    needs = needs_of(both)
    assert all(one in needs for one in (Input.REWARD, Input.GROUP, Reads.TEACHER_LOGP, Reads.POLICY_LOGP))


def test_needs_of_reads_teacher_logp_when_part_is_undeclared():
    undeclared = lambda batch: batch.teacher_logp  # noqa: E731
    for made in (credit.add(credit.group_reward(), undeclared), credit.scale(2.0, undeclared)):
        assert needs_of(made).reads(Reads.TEACHER_LOGP)


# --- solutions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards", list(itertools.product([0.0, 0.5, 1.0], repeat=4))[::3])
def test_from_peers_shows_next_right_response_of_group(rewards: tuple[float, ...]):
    samples = [2, 0, 3, 1]
    rollouts = [response(sample, reward) for sample, reward in zip(samples, rewards, strict=True)]
    expected = [oracle.next_right(samples, rewards, place) for place in range(4)]
    shown = from_peers()(rollouts)
    assert shown == ["hg" if peer is None else f"r{samples[peer]}" for peer in expected]
    assert from_peers()(rollouts[::-1]) == shown[::-1], "the order of rows changes nothing"


def test_from_peers_falls_back_on_data_when_no_peer_is_right():
    alone = [response(0, 1.0), response(1, 0.0)]
    assert from_peers("privileged_context")(alone) == ["hg", "r0"]
    assert from_peers("answer")(alone) == ["7", "r0"]
    assert from_peers(None)(alone) == [None, "r0"]
    bare = replace(PROMPT, privileged_context=None)
    assert from_peers()([response(0, 0.0, prompt=bare), response(1, None, prompt=bare)]) == [None, None]


def test_from_peers_skips_other_prompts_and_duplicates():
    other = replace(PROMPT, id=5, privileged_context=None)
    rollouts = [response(0, 1.0), response(0, 0.0, prompt=other), response(1, 0.0, prompt=other)]
    assert from_peers()(rollouts) == ["hg", None, None]
    twice = [response(0, 1.0), response(1, 0.0)] * 2  # a step took the prompt twice: the same draws
    assert from_peers(None)(twice) == [None, "r0"] * 2


# --- what the teacher reads ------------------------------------------------------------------------------------------


def test_anti_sd_context_has_paper_wording():
    context = methods.build("anti_sd", {}).context
    read = context([response(0, 1.0, text="a right one"), response(1, 0.0)])
    assert [prompt.content for prompt in read] == [
        "ab\n\nYour previous attempt:\nhg\n\nPrevious assessment: Your answer is correct.\n\n"
        "Now solve this problem step by step.",
        "ab\n\nYour previous attempt:\na right one\n\nPrevious assessment: Your answer is incorrect.\n\n"
        "Now solve this problem step by step.",
    ]


def test_privileged_rewrites_last_user_message_when_solved():
    chat = replace(PROMPT, content=({"role": "system", "content": "s"}, {"role": "user", "content": "ab"}))
    template = "{privileged_context}{{}}{prompt}{verdict}"
    context = contexts.privileged(template=template, solutions=from_peers(None))
    read = context([response(0, 1.0, text="{x}", prompt=chat), response(1, 0.0, prompt=chat)])
    assert read[0] == chat
    assert [m["content"] for m in read[1].content if isinstance(m, dict)] == ["s", "{x}{}abincorrect"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{prompt}",
            r"fill the field \{privileged_context\}, but neither .* has this field; got template '\{prompt\}'",
        ),
        ("{privileged_context}", r"\{prompt\} \(needed\)"),
        ("{prompt}{solution}{privileged_context}", r"has the fields .*; got \['privileged_context', 'prompt', 'solu"),
    ],
)
def test_anti_sd_refuses_template_with_wrong_fields(template: str, message: str):
    with pytest.raises(ConfigError, match=message):
        methods.build("anti_sd", {"template": template})


def test_anti_sd_context_raises_data_error_when_reward_is_none():
    with pytest.raises(DataError, match=r"response to prompt 4 has no reward"):
        methods.build("anti_sd", {}).context([response(0, None)])


def test_anti_sd_context_is_prompt_when_judge_failed():
    failed = replace(response(0, None), unjudged="the server is out")
    assert from_peers()([failed, response(1, 0.0)]) == [None, "hg"]
    read = methods.build("anti_sd", {}).context([failed, response(1, 0.0)])
    assert read[0] == PROMPT
    assert "is incorrect" in str(read[1].content)


# --- the gate --------------------------------------------------------------------------------------------------------


def entropies(*values: float) -> Batch:
    """One response whose tokens have these entropies of the teacher."""
    row = torch.tensor([values])
    return batch_of(torch.zeros_like(row), torch.zeros_like(row), entropy=row)


def alone(value: Any) -> list[Any]:
    return [value]


def run_gate(gate: EntropyGate, medians: Sequence[float]) -> list[float]:
    strengths: list[float] = []
    for median in medians:
        metrics = gate.observe(entropies(median - 0.125, median, median + 0.5), alone)
        assert metrics["gate/open"] == gate.factor()
        assert metrics["gate/teacher_entropy"] == pytest.approx(median)
        strengths.append(gate.factor())
    return strengths


# Warm-up, mean 1; then: between the thresholds from above, below, between from below, just under H_warm, over, between.
MEDIANS = [1.0, 1.5, 0.5, 1.25, 0.75, 0.95, 0.94, 0.925, 0.95, 0.99, 1.0, 0.94, 0.5, 2.0]


def test_entropy_gate_opens_and_closes_with_hysteresis():
    expected = oracle.entropy_gate(MEDIANS, most=1.0)
    assert expected[5:] == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert run_gate(EntropyGate(ALL, closes_below=0.93, warm_up=5), MEDIANS) == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stop", [2, 5, 9, 20])
def test_entropy_gate_equals_oracle_when_restored(seed: int, stop: int):
    medians = (1 + 0.1 * logits(seed, 40, scale=1.0).cumsum(0)).abs().float().tolist()
    expected = oracle.entropy_gate(medians, most=1.0, share=0.9, warm_up=4)
    assert {*expected[4:]} == {0.0, 1.0} or seed not in (0, 1)
    first, second = (EntropyGate(ALL, closes_below=0.9, warm_up=4) for _ in range(2))
    before = run_gate(first, medians[:stop])
    second.load_state_dict(first.state_dict(), first.tensors())
    assert before + run_gate(second, medians[stop:]) == expected


def test_anti_sd_pushes_from_first_step_when_gate_is_off():
    free, gated = (methods.build("anti_sd", {"gate": gate, "strength": 0.5}) for gate in (False, True))
    batch = batch_of(logits(0, 2, 3), logits(1, 2, 3), rewards=[1.0, 0.0])
    batch = replace(batch, memory=gated.make_memory())
    pushed = free.credit(batch) - gated.credit(batch)
    assert torch.equal(gated.credit(batch), credit.group_reward()(batch))
    assert pushed == pytest.approx(credit.diverge_from_teacher(0.5, from_peers())(batch))


def test_entropy_gate_takes_median_of_solved_in_all_processes():
    rows = torch.tensor([[0.1, 0.9, math.nan], [0.4, 5.0, 0.2], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])
    nothing = torch.zeros_like(rows)
    mine = batch_of(nothing, nothing, mask=mask, entropy=rows)
    theirs = torch.tensor([0.3, 0.25, 6.0])
    gate = EntropyGate(lambda rollouts: ["x", "x", None], closes_below=0.93, warm_up=1)
    metrics = gate.observe(mine, lambda value: [theirs, value])
    expected = oracle.lower_median([0.1, 0.9, 0.4, 0.2, 0.3, 0.25, 6.0])
    assert metrics["gate/teacher_entropy"] == pytest.approx(expected)


def test_unsolved_counts_rows_of_all_processes():
    nothing = torch.zeros(3, 2)
    counted = solutions.Unsolved(lambda rollouts: ["x", None, None])
    assert counted.observe(batch_of(nothing, nothing), lambda value: [value, 3]) == {"context/unsolved": 5.0}


def test_entropy_gate_keeps_state_when_step_is_unsolved():
    solved = True
    gate = EntropyGate(lambda rollouts: ["x" if solved else None], closes_below=0.93, warm_up=2)
    run_gate(gate, [1.0])
    solved = False
    metrics = gate.observe(entropies(0.1), alone)
    assert "gate/teacher_entropy" not in metrics
    assert metrics["gate/open"] == 0.0
    solved = True
    assert run_gate(gate, [1.0, 1.0, 0.5]) == [0.0, 1.0, 0.0]
    solved = False
    assert gate.observe(entropies(9.0), alone)["gate/open"] == 0.0


@pytest.mark.parametrize("options", [{"closes_below": 0.0}, {"closes_below": 1.1}, {"warm_up": 0}])
def test_anti_sd_refuses_wrong_gate_options(options: dict[str, float]):
    with pytest.raises(ConfigError, match=r"needs closes_below .* got closes_below"):
        methods.build("anti_sd", options)


@pytest.mark.parametrize("strength", [-0.1, math.inf, math.nan])
def test_anti_sd_refuses_wrong_strength(strength: float):
    with pytest.raises(ConfigError, match=r"at least 0 and finite, got|Input should be a finite number"):
        methods.build("anti_sd", {"strength": strength})


# --- the released form ------------------------------------------------------------------------------------------------

Scored = tuple[list[list[float]], list[list[float]]]  # log q and log p by response and token


def scored_steps(seed: int, count: int, spikes: bool = False) -> list[Scored]:
    """Steps whose mean perplexity of the teacher wanders about 1.6, with responses of three to seven tokens."""
    draw = torch.Generator().manual_seed(seed)
    level, steps = 0.45, list[Scored]()
    for number in range(count):
        level = max(0.1, 0.45 + 0.8 * (level - 0.45) + 0.08 * float(torch.randn(1, generator=draw)))
        lengths = [int(x) for x in torch.randint(3, 8, (4,), generator=draw)]
        teacher = [(-level * 2 * torch.rand(n, generator=draw, dtype=torch.float64)).tolist() for n in lengths]
        if spikes and number > 1 and float(torch.rand(1, generator=draw)) < 0.4:
            teacher[0] = [-1.5] * lengths[0]
        student = [(-0.9 * torch.rand(n, generator=draw, dtype=torch.float64)).tolist() for n in lengths]
        student[1][0] = teacher[1][0] - 2.5  # an outlier
        steps.append((teacher, student))
    return steps


def batch_of_step(step: Scored, **memory: Any) -> Batch:
    """The responses padded to one length, right and wrong in turn; the padding holds NaN."""
    rewards = [1.0, 0.0, 1.0, 0.0][: len(step[0])]
    width = max(map(len, step[0]))
    teacher, student = (
        torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64) for rows in step
    )
    return replace(batch_of(teacher, student, rewards=rewards, mask=~teacher.isnan()), memory=memory)


def run_perplexity(gate: PerplexityGate, steps: Sequence[Scored]) -> list[list[float]]:
    out: list[list[float]] = []
    for step in steps:
        batch = batch_of_step(step, gate=gate)
        metrics = gate.observe(batch, alone)
        got = perplexity_gate.strengths(batch)[:, 0].tolist()
        assert metrics["gate/strength"] == pytest.approx(sum(got) / len(got))
        assert metrics["gate/open"] or not any(got)
        out.append(got)
    return out


@pytest.mark.parametrize("spikes", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stop", [2, 5, 6, 20])
def test_perplexity_gate_equals_oracle_when_restored(seed: int, stop: int, spikes: bool):
    steps = scored_steps(seed, 40, spikes)
    expected = oracle.perplexity_gate(steps, warm_up=4)
    first, second = (PerplexityGate(ALL, Settings(warm_up=4)) for _ in range(2))
    before = run_perplexity(first, steps[:stop])
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state, first.tensors())
    got = before + run_perplexity(second, steps[stop:])
    assert [pytest.approx(row, abs=1e-12) for row in expected] == got
    assert second.sigma == pytest.approx(oracle.reference_deviation(steps[:4]), rel=1e-12)
    values = [value for row in expected[5:] for value in row]
    assert 0.0 in values
    assert spikes or max(values) > 0.0  # spikes in a warm-up step raise the target: the gate may stay closed
    assert max(values) <= 0.2 * math.log(3 / 1.01)


def test_perplexity_gate_closes_one_step_late_and_opens_above_median():
    """Perplexities 2 in the warm-up: target 1.86, opens again above 2.14; a step sees the state before it."""
    means = [2.0, 2.0, 2.5, 1.8, 2.5, 2.1, 2.1, 2.2, 2.0, 1.9]
    steps: list[Scored] = [([[-math.log(x)] * 3] * 2, [[-0.5] * 3] * 2) for x in means]
    got = run_perplexity(PerplexityGate(ALL, Settings(warm_up=2)), steps)
    assert [bool(row[0]) for row in got] == [False, False, True, False, False, True, True, True, True, True]
    assert got == [pytest.approx(row) for row in oracle.perplexity_gate(steps, warm_up=2)]
    free = run_perplexity(PerplexityGate(ALL, Settings(warm_up=2, closes=False)), steps)
    assert free[4][0] == pytest.approx(0.2 * math.log(2.5 / 1.86))
    assert free[3][0] == 0.0, "below the target lambda is 0 in any case"


def test_perplexity_gate_takes_first_step_when_warm_up_spikes():
    means = [9.0, 9.0, 1.5, 1.6]
    steps: list[Scored] = [([[-math.log(x)] * 3], [[-0.5] * 3]) for x in means]
    gate = PerplexityGate(ALL, Settings(warm_up=2))
    got = run_perplexity(gate, steps)
    assert gate.target == pytest.approx(0.93 * 1.5)
    assert got == [pytest.approx(row) for row in oracle.perplexity_gate(steps, warm_up=2)]


def test_perplexity_gate_measures_solved_of_all_processes():
    """Two processes of two responses are one of four, and a response without a solution is in neither."""
    (step,) = scored_steps(3, 1)
    whole, half = (PerplexityGate(ALL, Settings()) for _ in range(2))
    whole.observe(batch_of_step(step), alone)
    parts = [batch_of_step((step[0][at : at + 2], step[1][at : at + 2])) for at in (0, 2)]
    said: list[Any] = []
    PerplexityGate(ALL, Settings()).observe(parts[1], lambda value: said.append(value) or [value])
    half.observe(parts[0], lambda value: [value, *said])
    assert half.state_dict() == whole.state_dict()
    only = PerplexityGate(lambda rollouts: ["x", "x", None, None], Settings())
    only.observe(batch_of_step(step), alone)
    alike = PerplexityGate(ALL, Settings())
    alike.observe(parts[0], alone)
    assert only.state_dict() == alike.state_dict()
    nothing = PerplexityGate(lambda rollouts: [None] * 4, Settings())
    assert nothing.observe(batch_of_step(step), alone) == {"gate/open": 0.0}
    assert nothing.measured == 0


@pytest.mark.parametrize("shape", ["jsd", "reverse_kl"])
@pytest.mark.parametrize("seed", range(3))
def test_anti_sd_released_credit_equals_oracle(seed: int, shape: str):
    """A at every token, in float64, in the warm-up and after it."""
    options = {"form": "released", "solution": "privileged_context", "shape": shape, "warm_up": 2}
    method = methods.build("anti_sd", options)
    memory, steps = method.make_memory(), scored_steps(seed, 3)
    steps[2][0][3] = [-0.9] * len(steps[2][0][3])  # a teacher of perplexity e^.9 = 2.46
    sigma = oracle.reference_deviation(steps[:2])
    rewards = (1.0, 0.0, 1.0, 0.0)
    zeroed = 0
    for number, step in enumerate(steps):
        batch = batch_of_step(step, **memory)
        memory["gate"].observe(batch, alone)
        got = method.credit(batch)
        strengths = oracle.perplexity_gate(steps[: number + 1], warm_up=2)[-1]
        group = oracle.group_advantage(rewards)
        for row, (teacher, student) in enumerate(zip(*step, strict=True)):
            u = [t - s for t, s in zip(teacher, student, strict=True)]
            zeroed += sum(abs(x) > 2 * sigma for x in u)
            term = oracle.released_anti_term(u, sigma, shape)
            expected = [group[row] + strengths[row] * value for value in term]
            assert got[row, : len(u)].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert not bool(got[row, len(u) :].isnan().any()), "padding holds NaN"
    assert zeroed
    assert any(strengths)


def test_standardised_sums_to_zero_and_is_bounded():
    values = logits(0, 3, 200)
    values[1, 0] = 1e4
    mask = torch.rand(3, 200, generator=torch.Generator().manual_seed(1)) < 0.8
    batch = batch_of(values, torch.zeros_like(values), mask=mask)
    part = credit.scale(-1.0, credit.diverge_from_teacher(1.0, ALL, shape="reverse_kl"))
    got = credit.standardised(part, bound=5.0)(batch)
    assert got[~mask].abs().max() == 0.0
    assert float(got[0].sum()) == pytest.approx(0.0, abs=1e-9)
    assert float(got[0].square().sum() / mask[0].sum()) == pytest.approx(1.0)
    assert float(got[1].max()) == 5.0
    assert torch.equal(credit.standardised(credit.scale(7.0, part), 5.0)(batch).sign(), got.sign())
    with pytest.raises(ConfigError, match=r"bound of a standardised credit must be above 0, got 0\.0"):
        credit.standardised(part, bound=0.0)


def test_anti_sd_reads_solutions_by_form():
    read = {
        form: methods.build("anti_sd", {"form": form}).context([response(0, 0.0)]) for form in ("paper", "released")
    }
    assert "hg" in str(read["paper"][0].content)
    assert read["released"] == [PROMPT]
    chosen = methods.build("anti_sd", {"form": "released", "solution": "answer"}).context([response(0, 0.0)])
    assert "7" in str(chosen[0].content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"closes_below": 0.0}, r"needs closes_below above 0 .* got closes_below 0\.0"),
        ({"warm_up": 0}, r"warm_up of at least 1 step; got .*warm_up 0"),
        ({"strength": -0.1}, r"at least 0 and finite, got sensitivity 0\.2 and most -0\.1"),
    ],
)
def test_anti_sd_released_refuses_wrong_options(options: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        methods.build("anti_sd", {"form": "released", **options})


@pytest.mark.parametrize(
    ("setting", "value"), [("opens_above", 0.9), ("spike", 1.0), ("sigmas", 0.0), ("largest", -1.0)]
)
def test_settings_refuse_numbers_outside_range(setting: str, value: float):
    with pytest.raises(ConfigError, match=rf"A perplexity gate needs .*{value}"):
        Settings(**{setting: value})


# --- two that pull against each other --------------------------------------------------------------------------------

AWAY = credit.diverge_from_teacher(0.5, ALL)
ALLOWED = credit.diverge_from_teacher(0.5, ALL, allow_sign_conflict=True)
PG = signals.policy_gradient(signals.credit)
KL = signals.divergence("reverse_kl")


@pytest.mark.parametrize(
    ("pieces", "towards", "away"),
    [
        ({"credit": AWAY, "signal": signals.add(PG, signals.scale(0.3, KL))}, "signal", "credit"),
        ({"credit": AWAY, "signal": signals.policy_gradient(signals.log_ratio)}, "signal", "credit"),
        ({"credit": credit.add(AWAY, credit.discounted(0.0)), "signal": PG}, "credit", "credit"),
        ({"signal": signals.add(KL, signals.scale(-1.0, signals.divergence("forward_kl")))}, "signal", "signal"),
        ({"credit": credit.discounted(0.0), "signal": signals.add(PG, signals.scale(-0.1, KL))}, "credit", "signal"),
    ],
)
def test_check_coherence_refuses_sign_conflict(pieces: dict[str, Any], towards: str, away: str):
    with pytest.raises(
        ConfigError,
        match=rf"^Here: a piece moves the student towards its teacher \(the {towards}\) and a piece moves it away "
        rf"\(the {away}\).*Leave one of the two out, or set allow_sign_conflict",
    ):
        check_coherence(Facts(method=Method(support=supports.top_k(3), **pieces)), "Here")


@pytest.mark.parametrize(
    "pieces",
    [
        {"credit": ALLOWED, "signal": signals.add(PG, KL)},
        {"credit": credit.add(AWAY, credit.scale(-1.0, credit.discounted(0.0))), "signal": PG},  # the same way
        {"credit": credit.add(credit.group_reward(), AWAY), "signal": PG},
        {"credit": credit.group_reward(), "signal": signals.add(PG, KL)},
    ],
)
def test_check_coherence_accepts_aligned_or_allowed_signs(pieces: dict[str, Any]):
    check_coherence(Facts(method=Method(support=supports.top_k(3), **pieces)), "Here")


def test_check_coherence_accepts_every_method():
    for name, function in methods.METHODS.items():
        needed = {
            "topk_reverse_kl": {"k": 3},
            "local_support_matching": {"k": 3},
            "context_distillation": {"system": "s"},
        }
        check_coherence(Facts(method=function(**needed.get(name, {}))), name)


def both_ways(allow: bool = False) -> Method:
    """anti_sd with an imitation of the same teacher beside it."""
    away = methods.build("anti_sd", {"template": "{privileged_context}{prompt}", "allow_sign_conflict": allow})
    return replace(away, support=supports.top_k(3), signal=signals.add(away.signal, KL))


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    return tmp_path / "work"


def stage(**more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "method": "anti_sd",
        "options": {"template": "{privileged_context}{prompt}"},
        "teacher": None,
        "reward": {"name": "final_number"},
        "sampling": {"max_completion_length": 3, "n": 2},
        "steps": 8,
        **more,
    }
    return one_stage(**settings) | {"models": {"student": tiny_model(2)}}


def test_anti_sd_run_equals_grpo_until_gate_opens(work: Path):
    """The gate's decisions are the oracle's for the medians that the run logs; the reward alone trains before."""
    rows = opd.run(stage(), quiet=True).metrics
    medians = [row["gate/teacher_entropy"] for row in rows]
    assert [row["gate/open"] for row in rows] == oracle.entropy_gate(medians, most=1.0)
    assert all(row["context/unsolved"] == 0 for row in rows)
    assert rows[-1]["gate/warm_entropy"] == pytest.approx(sum(medians[:5]) / 5)
    plain = opd.run(stage(method="grpo", options={}) | {"output_dir": "plain"}, quiet=True).metrics
    assert [row["train/loss"] for row in rows[:5]] == [row["train/loss"] for row in plain[:5]]
    assert any(row["gate/open"] for row in rows)
    assert [row["optim/grad_norm"] for row in rows] != [row["optim/grad_norm"] for row in plain]


def test_anti_sd_released_run_equals_grpo_until_warm_up_ends(work: Path):
    """The target and the open steps follow from the logged perplexities; the reward alone trains in the warm-up."""
    options = {"template": "{privileged_context}{prompt}", "form": "released", "solution": "answer", "warm_up": 3}
    rows = opd.run(stage(options=options, steps=6), quiet=True).metrics
    plain = opd.run(stage(method="grpo", options={}, steps=6) | {"output_dir": "plain"}, quiet=True).metrics
    assert [row["train/loss"] for row in rows[:3]] == [row["train/loss"] for row in plain[:3]]
    assert [row["gate/open"] for row in rows[:4]] == [0.0, 0.0, 0.0, 1.0]
    warm = [row["gate/teacher_perplexity"] for row in rows[:3] if row["gate/teacher_perplexity"] < 3]
    expected = sorted(warm)[len(warm) // 2] if warm else rows[3]["gate/teacher_perplexity"]
    assert rows[-1]["gate/target_perplexity"] == pytest.approx(max(0.93 * expected, 1.01))


def test_anti_sd_run_counts_unsolved_when_solution_is_none(work: Path):
    rows = opd.run(stage(options={"template": "{privileged_context}{prompt}", "solution": None}), quiet=True).metrics
    assert any(row["context/unsolved"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": None}, r"needs a reward"),
        ({"sampling": {"max_completion_length": 3}}, r"needs several responses per prompt"),
        ({"teacher": "student"}, r"the student is its own teacher"),
        (
            {"evaluate": {"data": {"path": "held_out.jsonl"}, "teacher": True}},
            r"reads the student's attempt, .* Set evaluate.teacher to false",
        ),
        (
            {
                "reward": {"name": "rubric", "options": {"column": "answer"}, "judge": {"function": "textwrap:dedent"}},
                "evaluate": {"data": {"path": "held_out.jsonl"}, "kl": True, "reward": None},
            },
            r"evaluate.kl compares with a teacher that reads the rewards .* Set evaluate.reward to one that scores",
        ),
    ],
)
def test_anti_sd_run_refuses_unfit_recipe(work: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        opd.run(stage(**settings), quiet=True)


def test_run_refuses_sign_conflict_before_loading(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "both_ways": both_ways})
    with pytest.raises(ConfigError, match=r"'both_ways': a piece moves the student towards its teacher \(the signal\)"):
        opd.run(stage(method="both_ways", options={}), quiet=True)
    assert not Path("run").exists()
    allowed = opd.run(stage(method="both_ways", options={"allow": True}, steps=2), quiet=True)
    assert len(allowed.metrics) == 2


def test_evaluate_gives_reverse_kl_when_method_is_anti_sd(work: Path):
    sampling = {"drawn": {"max_completion_length": 3, "n": 2}}
    evaluate = {"data": {"path": "held_out.jsonl"}, "kl": True, "sampling": sampling}
    run = opd.run(stage(steps=1, evaluate=evaluate), quiet=True)
    assert all(row["eval/reverse_kl"] > 0 for row in run.metrics if "eval/reverse_kl" in row)
