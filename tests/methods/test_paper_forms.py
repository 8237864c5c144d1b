"""Forms that single papers use: the released weights of Rethinking, EMA-PG of Revisiting, discounted credit."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from support.models import double, full_logits, gradient_of, prompts_of, rollout_of, teacher_of, tiny
from torch import Tensor

from opd import methods, types
from opd.errors import ConfigError
from opd.loss.collate import attach, collate
from opd.maths import divergences
from opd.maths.divergences import on_support
from opd.pieces import credit, normalise, signals
from opd.types import ScoreRequest, Scores, Tokens

pytestmark = pytest.mark.numeric

EXACT = 1e-12
V, K = 12, 4


def logits(seed: int) -> Tensor:
    return 1.5 * torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER, SAMPLER = logits(1), logits(2), logits(3)
SUPPORT = TEACHER.topk(K).indices
ON_SUPPORT = torch.zeros(V, dtype=torch.bool).scatter(0, SUPPORT, True)
P = STUDENT.softmax(-1)
P_S, Q_S = P[SUPPORT].sum(), TEACHER.softmax(-1)[SUPPORT].sum()
GRAD_P_S = P * (ON_SUPPORT.double() - P_S)
LISTS = (STUDENT.tolist(), TEACHER.tolist(), SUPPORT.tolist())


def close(got: Any, expected: Any, tolerance: float = EXACT) -> None:
    got, expected = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def on(student: Tensor, ids: Tensor, exists: Tensor | None = None, sampler_logp: Tensor | None = None) -> Tokens:
    """One token's record with the support `ids` [K]."""
    zero = torch.zeros(1, dtype=torch.float64)
    return Tokens(
        student_logp=zero,
        sampler_logp=zero if sampler_logp is None else sampler_logp.reshape(1),
        teacher_logp=zero,
        advantage=zero,
        weight=zero,
        student_support_logp=student.log_softmax(-1)[ids][None],
        teacher_support_logp=TEACHER.log_softmax(-1)[ids][None],
        support_mask=torch.ones(1, len(ids), dtype=torch.bool) if exists is None else exists[None],
    )


def value_and_gradient(signal: types.Signal, ids: Tensor, **record: Any) -> tuple[Tensor, Tensor]:
    z = STUDENT.clone().requires_grad_()
    (value,) = signal(on(z, ids, **record))
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


# --- the released code of Rethinking ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("weights", ["student", "teacher", "none"])
def test_support_policy_gradient_equals_oracle(weights: Any, normalised: bool):
    signal = signals.support_policy_gradient(weights, normalised=normalised)
    value, gradient = value_and_gradient(signal, SUPPORT)
    s, t = oracle.log_softmax(LISTS[0]), oracle.log_softmax(LISTS[1])
    listed = ([s[v] for v in LISTS[2]], [t[v] for v in LISTS[2]])
    close(value, oracle.support_policy_gradient(*listed, weights, normalised))
    close(gradient, oracle.grad_support_policy_gradient(*LISTS, weights, normalised))
    # The surrogate with all that stands under sg held where it is: central differences of its value.
    w = oracle.support_weights(*listed, weights, normalised)

    def surrogate(z: list[float]) -> float:
        now = [oracle.log_softmax(z)[v] for v in LISTS[2]]
        return sum(w_v * (a - b) * math.exp(n - a) for w_v, a, b, n in zip(w, listed[0], listed[1], now, strict=True))

    for j in range(V):
        up, down = list(LISTS[0]), list(LISTS[0])
        up[j] += 1e-5
        down[j] -= 1e-5
        assert (surrogate(up) - surrogate(down)) / 2e-5 == pytest.approx(float(gradient[j]), abs=1e-8)


def test_support_policy_gradient_equals_stop_gradient_form():
    stopped = value_and_gradient(signals.divergence("reverse_kl", form="stop_gradient"), SUPPORT)
    close(value_and_gradient(signals.support_policy_gradient(normalised=False), SUPPORT)[1], stopped[1])
    normalised = value_and_gradient(signals.support_policy_gradient(), SUPPORT)
    close(normalised[0], stopped[0] / P_S)
    close(normalised[1], stopped[1] / P_S)


def test_support_policy_gradient_differs_from_paper_by_mass_push():
    renormalised, gradient = value_and_gradient(signals.divergence("reverse_kl", form="renormalised"), SUPPORT)
    released = value_and_gradient(signals.support_policy_gradient(), SUPPORT)[1]
    close(released - gradient, (torch.log(P_S / Q_S) + renormalised) * GRAD_P_S / P_S)


def test_support_policy_gradient_is_nonzero_on_one_token():
    first = SUPPORT[:1]
    close(value_and_gradient(signals.divergence("reverse_kl", form="renormalised"), first)[1], torch.zeros(V))
    ratio = (STUDENT.log_softmax(-1) - TEACHER.log_softmax(-1))[first]
    expected = ratio * ((torch.arange(V) == first).double() - P)
    close(value_and_gradient(signals.support_policy_gradient(), first)[1], expected)


@pytest.mark.parametrize("weights", ["student", "teacher", "none"])
def test_support_policy_gradient_is_exact_by_student_weights(weights: Any):
    everything = torch.arange(V)
    exact = oracle.grad_full(*LISTS[:2])
    got = value_and_gradient(signals.support_policy_gradient(weights), everything)[1]
    distance = float((got - torch.tensor(exact, dtype=torch.float64)).norm())
    assert distance < EXACT if weights == "student" else distance > 1e-2


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("weights", ["student", "teacher", "none"])
def test_support_policy_gradient_ignores_masked_entries(weights: Any, normalised: bool):
    signal = signals.support_policy_gradient(weights, normalised=normalised)
    expected = value_and_gradient(signal, SUPPORT[[0, 2]])
    exists = torch.tensor([True, False, True, False])
    got = value_and_gradient(signal, SUPPORT, exists=exists)
    close(got[0], expected[0])
    close(got[1], expected[1])
    dirty = on(STUDENT, SUPPORT, exists)
    assert dirty.teacher_support_logp is not None
    dirty = replace(dirty, teacher_support_logp=dirty.teacher_support_logp.masked_fill(~exists, torch.nan))
    close(signal(dirty)[0], expected[0])
    nothing = value_and_gradient(signal, SUPPORT, exists=torch.zeros(K, dtype=torch.bool))
    close(nothing[0], 0.0)
    close(nothing[1], torch.zeros(V))


def rethinking(**options: Any) -> Any:
    return methods.build("rethinking_opd", options)


def test_rethinking_opd_is_raw_when_by_symmetric_difference():
    tokens = on(STUDENT, SUPPORT)
    raw, normalised = (signals.support_policy_gradient(normalised=each)(tokens) for each in (False, True))
    assert float((raw - normalised).abs()) > 1e-3
    assert torch.equal(rethinking(form="released", by="symmetric_difference").signal(tokens), raw)
    assert torch.equal(
        rethinking(form="released", by="symmetric_difference", normalised=True).signal(tokens), normalised
    )
    assert torch.equal(rethinking(form="released", by="union").signal(tokens), normalised)


def test_rethinking_opd_refuses_options_against_paper_form():
    with pytest.raises(ConfigError, match=r"on one token, the loss is always 0.*k to 2 or more, or form: released"):
        rethinking(k=1)
    with pytest.raises(ConfigError, match=r"fixed weights.*weights='teacher', normalised=None\. Set form: released"):
        rethinking(weights="teacher")
    with pytest.raises(ConfigError, match=r"normalised=False"):
        rethinking(normalised=False)
    assert rethinking(k=1, by="union").support.k == 1
    assert rethinking(k=1, form="released").support.k == 1


def test_build_gives_paper_defaults():
    ours = rethinking()
    assert (ours.support.k, ours.support.by, ours.support.with_sampled) == (16, "student", False)
    matching = methods.build("local_support_matching", {})
    assert (matching.support.k, matching.support.by, matching.support.with_sampled) == (32, "teacher", False)


# --- EMA-PG of Revisiting --------------------------------------------------------------------------------------------


def sampled_tail(token: int, mu: Tensor, bounds: tuple[float, float] | None = None) -> tuple[Tensor, Tensor]:
    """The signal and its gradient for one drawn token, on the support and that token behind it."""
    ids = torch.cat([SUPPORT, torch.tensor([token])])
    exists = torch.ones(K + 1, dtype=torch.bool)
    exists[K] = not bool(ON_SUPPORT[token])
    signal = signals.reverse_kl_with_sampled_tail(bounds)
    return value_and_gradient(signal, ids, exists=exists, sampler_logp=mu.log_softmax(-1)[token])


@pytest.mark.parametrize("mu", [STUDENT, SAMPLER], ids=["on policy", "another sampler"])
def test_reverse_kl_with_sampled_tail_equals_oracle(mu: Tensor):
    for token in range(V):
        value, gradient = sampled_tail(token, mu)
        drawn = float(mu.log_softmax(-1)[token])
        close(value, oracle.ema_pg(*LISTS, token, drawn))
        close(gradient, oracle.grad_ema_pg(*LISTS, token, drawn))


@pytest.mark.parametrize("mu", [STUDENT, SAMPLER], ids=["on policy", "another sampler"])
def test_reverse_kl_with_sampled_tail_is_unbiased_in_value(mu: Tensor):
    """Every token, weighted by the probability with which it is drawn."""
    each = [sampled_tail(token, mu) for token in range(V)]
    drawn = mu.softmax(-1)
    mean = sum(float(m) * float(value) for m, (value, _) in zip(drawn, each, strict=True))
    exact = divergences.reverse_kl(STUDENT.log_softmax(-1), TEACHER.log_softmax(-1))
    close(mean, exact)
    head = on_support("reverse_kl", STUDENT.log_softmax(-1)[SUPPORT], TEACHER.log_softmax(-1)[SUPPORT], "raw")
    assert abs(float(head - exact)) > 1e-2, "the head alone is not the divergence"
    gradient = torch.stack([m * g for m, (_, g) in zip(drawn, each, strict=True)]).sum(0)
    close(gradient - torch.tensor(oracle.grad_full(*LISTS[:2]), dtype=torch.float64), GRAD_P_S)


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (0.9, 1.1), (0.0, 0.5), (2.0, 5.0)], ids=str)
def test_reverse_kl_with_sampled_tail_clips_ratio_to_bounds(bounds: tuple[float, float]):
    """A clipped ratio is a constant: the token keeps its gradient, which PPO's clip would take."""
    drawn = SAMPLER.log_softmax(-1)
    clipped = 0
    for token in range(V):
        value, gradient = sampled_tail(token, SAMPLER, bounds)
        close(value, oracle.ema_pg(*LISTS, token, float(drawn[token]), bounds))
        close(gradient, oracle.grad_ema_pg(*LISTS, token, float(drawn[token]), bounds))
        clipped += not bool(torch.allclose(value, sampled_tail(token, SAMPLER)[0]))
    assert clipped
    close(sampled_tail(0, STUDENT, (1.0, 1.0))[1], sampled_tail(0, STUDENT)[1])


@pytest.mark.parametrize("bounds", [(1.0, 0.5), (-0.1, 1.0), (0.0, float("inf")), (float("nan"), 1.0)], ids=str)
def test_reverse_kl_with_sampled_tail_refuses_wrong_bounds(bounds: tuple[float, float]):
    with pytest.raises(ConfigError, match=r"ratio are \(low, high\) with 0 <= low <= high; got \("):
        signals.reverse_kl_with_sampled_tail(bounds)


def test_ratio_bounds_acts_only_when_sampled_token_is_tail():
    with pytest.raises(
        ConfigError, match=r"sampled_token is 'left_out', without a ratio; got \[0\.5, 2\.0\]\. Set sampled"
    ):
        methods.build("local_support_matching", {"ratio_bounds": [0.5, 2]})
    tail = methods.build("local_support_matching", {"sampled_token": "tail", "k": 3, "ratio_bounds": [1, 1]})
    without = methods.build("local_support_matching", {"sampled_token": "tail", "k": 3})
    tokens = replace(on(STUDENT, torch.tensor([0, 1, 2, 5])), sampler_logp=torch.tensor([-3.0], dtype=torch.float64))
    tokens = replace(tokens, support_mask=torch.ones(1, 4, dtype=torch.bool))
    assert float(tail.signal(tokens)) != float(without.signal(tokens))


def test_reverse_kl_with_sampled_tail_ignores_masked_column():
    token = int(SUPPORT[0])
    expected = sampled_tail(token, STUDENT)
    exists = torch.tensor([True] * K + [False])
    tokens = on(STUDENT, torch.cat([SUPPORT, SUPPORT[:1]]), exists, torch.tensor(torch.nan, dtype=torch.float64))
    assert tokens.teacher_support_logp is not None
    tokens = replace(tokens, teacher_support_logp=tokens.teacher_support_logp.masked_fill(~exists, torch.nan))
    close(signals.reverse_kl_with_sampled_tail()(tokens)[0], expected[0])


def test_reverse_kl_with_sampled_tail_refuses_full_vocabulary():
    tokens = replace(on(STUDENT, torch.arange(V)), support_mask=None)
    with pytest.raises(ConfigError, match=r"is the whole vocabulary\. Give the method support=top_k\(k, with_sampled"):
        signals.reverse_kl_with_sampled_tail()(tokens)


@pytest.mark.parametrize("name", ["topk_reverse_kl", "context_distillation"])
def test_build_refuses_k_of_one_when_form_is_default(name):
    template = {"template": "{prompt}"} if name == "context_distillation" else {}
    with pytest.raises(ConfigError, match=r"on one token, the loss is always 0.*Set k to 2 or more, or form: tail"):
        methods.build(name, {"k": 1, **template})
    assert methods.build(name, {"k": 1, "form": "tail", **template}).support.k == 1


def test_local_support_matching_refuses_k_of_one():
    with pytest.raises(ConfigError, match=r"on one token, the loss is always 0.*Set k to 2 or more"):
        methods.build("local_support_matching", {"k": 1})
    assert methods.build("local_support_matching", {"k": 1, "sampled_token": "tail"}).support.with_sampled


# --- tokens that a teacher's list lacks ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["raw", "stop_gradient"])
def test_filled_teacher_logp_has_no_value_and_pushes_only_raw(form: str):
    """The released code of Many Faces takes the student's own log-prob for a token that the teacher's list lacks."""
    z = STUDENT.clone().requires_grad_()
    filled = STUDENT.log_softmax(-1)[SUPPORT]
    value = on_support("reverse_kl", z.log_softmax(-1)[SUPPORT], filled, form)
    (gradient,) = torch.autograd.grad(value, z)
    close(value.detach(), 0.0)
    close(gradient, GRAD_P_S if form == "raw" else torch.zeros(V))


# --- discounted credit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_discounted_equals_oracle_and_skips_masked_tokens(gamma: float):
    lm = tiny()
    trained = ([True] * 5, [True, False, True, True, False], [False, True])
    rollouts = [
        rollout_of(lm, prompt, [3] * len(mask), trained=mask, policy_logp=-torch.rand(len(mask)))
        for prompt, mask in zip(prompts_of("a", "b", "c"), trained, strict=True)
    ]
    scores = [Scores(teacher_logp=-torch.rand(len(mask))) for mask in trained]
    got = credit.discounted(gamma)(collate(rollouts, scores, torch.device("cpu")))
    assert got.shape == (3, 5)
    for row, (rollout, score, mask) in enumerate(zip(rollouts, scores, trained, strict=True)):
        kept = [t for t, one in enumerate(mask) if one]
        assert rollout.policy_logp is not None
        ratios = (score.teacher_logp - rollout.policy_logp)[kept].tolist()
        close(got[row, kept], oracle.discounted(ratios, gamma), 1e-6)
    assert bool(got.isfinite().all()), "padding holds NaN"


@pytest.mark.parametrize("gamma", [0.3, 0.9, 1.0])
def test_discounted_ends_sum_at_untrained_token_when_by_turn(gamma: float):
    """Three turns: a tool's tokens at 2, at 5 and at 6. Across turns a token also has the discounted later turns."""
    lm = tiny()
    mask = [True, True, False, True, True, False, False, True]
    ratios = [0.5, -1.0, 9.0, 2.0, 0.25, 9.0, -9.0, -0.75]
    (prompt,) = prompts_of("a")
    rollout = rollout_of(lm, prompt, [3] * len(mask), trained=mask, policy_logp=torch.zeros(len(mask)))
    batch = collate([rollout], [Scores(teacher_logp=torch.tensor(ratios))], torch.device("cpu"))
    kept = torch.tensor(mask)
    by_turn = credit.discounted(gamma, across_turns=False)(batch)[0]
    close(by_turn[kept], torch.tensor(oracle.discounted_by_turn(ratios, mask, gamma))[kept], 1e-6)
    assert by_turn[1] == -1.0, "the last token of a turn has its own log-ratio alone"
    across = credit.discounted(gamma)(batch)[0]
    later = oracle.discounted([2.0, 0.25, -0.75], gamma)[0]
    close(across[1] - by_turn[1], gamma * later, 1e-6)


def test_discounted_by_turn_equals_across_turns_without_tools():
    lm = tiny()
    (prompt,) = prompts_of("a")
    batch = collate(
        [rollout_of(lm, prompt, [3] * 6, policy_logp=-torch.rand(6))],
        [Scores(teacher_logp=-torch.rand(6))],
        torch.device("cpu"),
    )
    assert torch.equal(credit.discounted(0.7, across_turns=False)(batch), credit.discounted(0.7)(batch))


def test_opd_refuses_by_turn_without_gamma():
    with pytest.raises(ConfigError, match=r"across_turns=False ends the sum .* but gamma is 0.*Set gamma above 0"):
        methods.build("opd", {"across_turns": False})


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_opd_refuses_gamma_outside_0_to_1(gamma: float):
    with pytest.raises(ConfigError, match=rf"gamma lies between 0 .* and 1 .*, got {gamma}"):
        methods.build("opd", {"gamma": gamma})


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_discounted_equals_sequence_kl_gradient_when_gamma_is_1(gamma: float):
    """All responses of at most two tokens, each weighted by its probability; gamma = 0 leaves out what comes later."""
    student, external = tiny(padding_rows=3), tiny(seed=1, hidden=24)
    (prompt,) = prompts_of("gab")
    prefix, size, end = student.tokenizer("gab").input_ids, student.vocabulary, student.tokenizer.eos_token_id
    responses = [[end], *([a, b] for a, b in itertools.product(range(size), repeat=2) if a != end)]

    exact, judge = double(student), double(external)
    kl = torch.zeros((), dtype=torch.float64)
    chosen: list[list[float]] = []
    for response in responses:
        ids = torch.tensor(response)
        log_p = full_logits(exact, prefix, ids, size).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        with torch.no_grad():
            log_q = full_logits(judge, prefix, ids, size).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        kl = kl + log_p.sum().exp() * (log_p.sum() - log_q.sum())
        chosen.append(log_p.tolist())
    assert math.fsum(math.exp(sum(logp)) for logp in chosen) == pytest.approx(1.0)
    kl.backward()

    built = methods.build("opd", {"gamma": gamma})
    method = replace(  # the mean over responses of the sum over tokens
        built,
        normalise=normalise.per(1),
        weight=lambda batch: batch.policy_logp.nansum(1, keepdim=True).exp().expand(batch.mask.shape) * len(responses),
    )
    rollouts = [
        rollout_of(student, prompt, response, sampler_logp=torch.tensor(logp), policy_logp=torch.tensor(logp))
        for response, logp in zip(responses, chosen, strict=True)
    ]
    teacher = teacher_of(method, student, external)
    assert teacher is not None
    scores = teacher.score(rollouts, method.context(rollouts), ScoreRequest(support=method.support, temperature=1.0))
    batch = attach(collate(rollouts, scores, student.device), method)
    got = gradient_of(method, student, teacher, batch, method.normalise(batch))
    square = sum(float((got.grads[n].double() - p.grad).square().sum()) for n, p in exact.named_parameters())
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in exact.parameters()))
    assert norm > 0.1
    distance = math.sqrt(square) / norm
    assert distance < 2e-5 if gamma == 1.0 else distance > 0.05
