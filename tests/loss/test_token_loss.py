"""The fused loss of every signal against the unfused formula: logits, log_softmax, Tokens, signal, weighted sum.

The formula is written here in float64 and left to autograd; the library runs in float32, at several sizes of chunks
(one matmul each) and tiles (what fits a cache).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import opd.models.head
from opd.loss.collate import MicroBatch
from opd.loss.token_loss import loss_at
from opd.maths import divergences
from opd.method import Method
from opd.models.head import Head
from opd.pieces import signals, supports
from opd.types import Signal, Support, Tokens

pytestmark = pytest.mark.numeric

N, V, H, K = 11, 17, 6, 5
PADDING = 2  # rows of the heads that are no tokens
COUNT = 3.0
SIZES = [(1, 1), (4 * V, V), (4 * V, 3 * V), (2**20, 3 * V), (2**20, 2**20)]  # entries of a chunk, of a tile
every_size = pytest.mark.parametrize(("chunk", "tile"), SIZES)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Hidden states and a head that train, what phase A hands over, and the teacher's head."""

    method: Method
    hidden: Tensor
    head: Head
    micro: MicroBatch
    teacher_head: Head | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        bias = {} if self.head.bias is None else {"bias": self.head.bias}
        return {"hidden": self.hidden, "weight": self.head.weight, **bias}


def head_of(kind: str, seed: int, width: int = H) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(V + PADDING, width, generator=generator), torch.randn(V + PADDING, generator=generator)
    plain = Head(weight=weight, bias=None, vocabulary=V)
    return {
        "plain": plain,
        "bias": replace(plain, bias=bias),
        "everything": replace(plain, bias=bias, multiplier=0.5, softcap=2.0),
    }[kind]


def problem(
    signal: Signal, support: Support, *, kind: str = "bias", temperature: float = 1.0, n: int = N, seed: int = 0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    head, teacher = head_of(kind, 1), head_of("everything", 2, H + 3)
    bias = None if head.bias is None else head.bias.requires_grad_()
    hidden = (0.7 * normal(n, H)).requires_grad_()
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(n)])
    exists = torch.rand(n, K, generator=generator) < 0.7
    exists[0], exists[1] = False, True
    theirs = normal(n, V).log_softmax(-1).gather(-1, ids).masked_fill(~exists, torch.nan)
    top_k, full = support.kind == "top_k", support.kind == "full"
    micro = MicroBatch(
        rollouts=(),
        row=torch.zeros(n, dtype=torch.long),
        step=torch.arange(n),
        token_ids=torch.randint(0, V, (n,), generator=generator),
        share=torch.rand(n, generator=generator),
        sampler_logp=-1.0 - normal(n).abs(),
        policy_logp=torch.full((n,), torch.nan),
        teacher_logp=torch.full((n,), torch.nan) if full else -1.0 - normal(n).abs(),
        advantage=normal(n),
        weight=torch.rand(n, generator=generator),
        support_ids=ids if top_k else None,
        support_mask=exists if top_k else None,
        teacher_support_logp=theirs if top_k else None,
        teacher_hidden=normal(n, H + 3) if full else None,
    )
    return Problem(
        method=Method(signal=signal, support=support, temperature=temperature),
        hidden=hidden,
        head=replace(head, weight=head.weight.requires_grad_(), bias=bias),
        micro=micro,
        teacher_head=teacher if full else None,
    )


# --- both ways -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loss: float
    grads: Mapping[str, Tensor]
    metrics: Mapping[str, float]


def fused(of: Problem, factor: float = 1.0) -> Outcome:
    for leaf in of.leaves.values():
        leaf.grad = None
    loss, metrics = loss_at(of.method, of.hidden, of.head, of.micro, COUNT, of.teacher_head)
    (factor * loss).backward()
    grads = {name: leaf.grad for name, leaf in of.leaves.items() if leaf.grad is not None}
    assert grads.keys() == of.leaves.keys()
    return Outcome(loss=loss.item(), grads=grads, metrics=metrics.reduce())


def plain_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, temperature: float) -> Tensor:
    logits = hidden @ weight[:V].t()
    logits = (logits if bias is None else logits + bias[:V]) * head.multiplier
    logits = logits if head.softcap is None else (logits / head.softcap).tanh() * head.softcap
    return (logits / temperature).log_softmax(-1)


def unfused(of: Problem) -> Outcome:
    """Everything at once, in float64, by autograd; the metrics by their definitions."""
    micro = replace(
        of.micro,
        **{
            f.name: getattr(of.micro, f.name).double()
            for f in fields(of.micro)
            if isinstance(getattr(of.micro, f.name), Tensor) and getattr(of.micro, f.name).is_floating_point()
        },
    )
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in of.leaves.items()}
    temperature = of.method.temperature
    log_p = plain_log_probs(leaves["hidden"], leaves["weight"], leaves.get("bias"), of.head, temperature)
    y = micro.token_ids[:, None]
    tokens = Tokens(
        student_logp=log_p.gather(-1, y)[:, 0],
        sampler_logp=micro.sampler_logp,
        teacher_logp=micro.teacher_logp,
        advantage=micro.advantage,
        weight=micro.weight,
    )
    metrics: dict[str, float] = {"train/student_nll": -tokens.student_logp.mean().item()}
    if micro.teacher_hidden is not None:
        teacher = of.teacher_head
        assert teacher is not None
        assert teacher.bias is not None
        log_q = plain_log_probs(
            micro.teacher_hidden, teacher.weight.double(), teacher.bias.double(), teacher, temperature
        )
        tokens = replace(
            tokens,
            teacher_logp=log_q.gather(-1, y)[:, 0],
            student_support_logp=log_p,
            teacher_support_logp=log_q,
        )
        metrics["teacher/log_ratio"] = (tokens.teacher_logp - tokens.student_logp).mean().item()
    elif micro.support_ids is not None:
        ours, exists = log_p.gather(-1, micro.support_ids), micro.support_mask
        theirs = micro.teacher_support_logp
        assert exists is not None
        assert theirs is not None
        tokens = replace(tokens, student_support_logp=ours, teacher_support_logp=theirs, support_mask=exists)
        metrics["support/student_mass"] = ours.exp().where(exists, 0.0).sum(-1).mean().item()
        metrics["support/teacher_mass"] = theirs.exp().where(exists, 0.0).sum(-1).mean().item()
        metrics["support/empty_share"] = (exists.sum(-1) == 0).double().mean().item()
    per_token = of.method.signal(tokens)
    assert per_token.shape == micro.token_ids.shape
    metrics["train/signal"] = per_token.mean().item()
    loss = (per_token * micro.weight * micro.share).sum() / COUNT
    if loss.requires_grad:
        loss.backward()
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return Outcome(loss=loss.item(), grads=grads, metrics=metrics)


def distance(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the expected norm (absolute below 1e-3)."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-3))


def assert_same(got: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    assert got.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
    for name, grad in expected.grads.items():
        assert bool(got.grads[name].isfinite().all()), name
        assert distance(got.grads[name], grad) < tolerance, name
    assert bool((got.grads["weight"][V:] == 0).all())
    for name, value in got.metrics.items():
        assert value == pytest.approx(expected.metrics[name], rel=tolerance, abs=tolerance), name


def set_sizes(monkeypatch: pytest.MonkeyPatch, chunk: int, tile: int) -> None:
    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", chunk)
    monkeypatch.setattr(opd.models.head, "TILE_ENTRIES", tile)


# --- the signals -----------------------------------------------------------------------------------------------------


def hidden_from_the_loss(signal: Signal) -> Signal:
    """The same signal as a function of which nothing is known: no closed form, no invariance."""
    return lambda tokens: signal(tokens)


def squared_gap(tokens: Tokens) -> Tensor:
    """A user's signal: looks at the token, its probability under everybody, and phase A's numbers."""
    gap = tokens.teacher_logp - tokens.student_logp
    return tokens.weight * gap.square() + tokens.advantage * (tokens.student_logp - tokens.sampler_logp).exp()


def own_divergence(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Squared Hellinger distance."""
    return (0.5 * (student_logp / 2).exp() - 0.5 * (teacher_logp / 2).exp()).square().sum(-1)


OF_TOKENS: dict[str, Signal] = {
    "nll": signals.nll(),
    "policy_gradient": signals.policy_gradient(),
    "policy_gradient-log_ratio": signals.policy_gradient(signals.log_ratio),
    "policy_gradient-importance": signals.policy_gradient(importance=True),
    "policy_gradient-clip": signals.policy_gradient(clip=(0.2, 0.3)),
    "policy_gradient-log_ratio-clip": signals.policy_gradient(signals.log_ratio, clip=(0.1, 0.5)),
    "add": signals.add(signals.nll(), signals.policy_gradient(importance=True)),
    "scale": signals.scale(-0.3, signals.nll()),
    "switch": signals.switch(lambda t: t.advantage > 0, signals.nll(), signals.policy_gradient(clip=(0.2, 0.2))),
    "user": squared_gap,
    "constant": lambda tokens: tokens.advantage * 2.0,
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "reverse_kl": [{}],
    "forward_kl": [{}],
    "generalised_jsd": [{}, {"beta": 0.1}, {"beta": 0.9}],
    "skew_kl": [{}, {"alpha": 0.4, "direction": "reverse"}],
}
DIVERGENCES = [(name, options) for name, all_options in OPTIONS.items() for options in all_options]
ON_SUPPORT: dict[str, Signal] = {
    "support_policy_gradient": signals.support_policy_gradient(),
    "own-tail": signals.divergence(own_divergence),
    "own-renormalised": signals.divergence(own_divergence, form="renormalised"),
    "user-renormalised": hidden_from_the_loss(signals.divergence("reverse_kl", form="renormalised")),
    "scale-renormalised": signals.scale(2.0, signals.divergence("reverse_kl", form="renormalised")),
    "add-renormalised-nll": signals.add(signals.divergence("forward_kl", form="renormalised"), signals.nll()),
    "add-tail-nll": signals.add(signals.divergence("reverse_kl"), signals.scale(0.1, signals.nll())),
    "switch": signals.switch(
        lambda t: t.teacher_logp > t.student_logp,
        signals.divergence("forward_kl", form="renormalised"),
        signals.scale(0.5, signals.divergence("reverse_kl", form="stop_gradient")),
    ),
}
TOP_K: dict[str, Signal] = {
    **OF_TOKENS,
    **ON_SUPPORT,
    **{
        f"{name}-{form}-{options}": signals.divergence(name, form=form, **options)
        for name, options in DIVERGENCES
        for form in divergences.FORMS
    },
}
FULL: dict[str, Signal] = {
    **OF_TOKENS,
    **ON_SUPPORT,
    **{f"{name}-{options}": signals.divergence(name, **options) for name, options in DIVERGENCES},
    **{
        f"{name}-{options}-hidden": hidden_from_the_loss(signals.divergence(name, **options))
        for name, options in DIVERGENCES
    },
    "every-form": signals.add(*(signals.divergence("reverse_kl", form=form) for form in divergences.FORMS)),
}


def test_divergences_all_have_cases():
    assert set(OPTIONS) == set(divergences.DIVERGENCES)


CASES = [
    *((supports.no_support(), name, signal) for name, signal in OF_TOKENS.items() if "ratio" not in name),
    *((supports.sampled(), name, signal) for name, signal in OF_TOKENS.items()),
    *((supports.top_k(K), name, signal) for name, signal in TOP_K.items()),
    *((supports.full(), name, signal) for name, signal in FULL.items()),
]
every_case = pytest.mark.parametrize(
    ("support", "signal"), [pytest.param(s, signal, id=f"{s.kind}-{name}") for s, name, signal in CASES]
)


@every_case
def test_loss_at_equals_unfused_formula(support: Support, signal: Signal, monkeypatch: pytest.MonkeyPatch):
    """At every size; the head has a bias, the temperature is not 1, the entries that do not exist hold NaN."""
    of = problem(signal, support, temperature=0.8)
    expected = unfused(of)
    moved = any(float(grad.norm()) > 1e-3 for grad in expected.grads.values())
    assert moved == (signal is not OF_TOKENS["constant"])
    for chunk, tile in SIZES:
        set_sizes(monkeypatch, chunk, tile)
        assert_same(fused(of), expected)


HEADS = [("plain", 1.0), ("everything", 1.0), ("plain", 2.5), ("everything", 0.6)]


@pytest.mark.parametrize(("kind", "temperature"), HEADS)
@pytest.mark.parametrize(
    ("support", "signal"),
    [
        pytest.param(supports.sampled(), signals.policy_gradient(signals.log_ratio), id="sampled"),
        pytest.param(supports.top_k(K), signals.divergence("reverse_kl"), id="top_k"),
        pytest.param(supports.top_k(K), signals.divergence("forward_kl", form="renormalised"), id="renormalised"),
        pytest.param(supports.full(), signals.divergence("generalised_jsd"), id="closed"),
        pytest.param(supports.full(), signals.divergence("skew_kl"), id="full"),
    ],
)
def test_loss_at_equals_unfused_formula_for_every_head(
    support: Support, signal: Signal, kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    of = problem(signal, support, kind=kind, temperature=temperature)
    expected = unfused(of)
    for chunk, tile in SIZES:
        set_sizes(monkeypatch, chunk, tile)
        assert_same(fused(of), expected)


def test_loss_at_gradient_scales_with_outer_factor():
    of = problem(signals.divergence("reverse_kl"), supports.top_k(K))
    once, thrice = fused(of), fused(of, 3.0)
    for name, grad in once.grads.items():
        torch.testing.assert_close(thrice.grads[name], 3.0 * grad)


@every_case
def test_loss_at_metrics_are_unchanged_by_chunk_and_tile(
    support: Support, signal: Signal, monkeypatch: pytest.MonkeyPatch
):
    of = problem(signal, support)
    seen: list[Mapping[str, float]] = []
    for chunk, tile in SIZES:
        set_sizes(monkeypatch, chunk, tile)
        seen.append(fused(of).metrics)
    expected = {"train/signal"} if signal_is_shift_invariant(support, signal) else {"train/signal", "train/student_nll"}
    expected |= {"teacher/log_ratio"} if support.kind == "full" else set()
    expected |= {"support/teacher_mass", "support/empty_share"} if support.kind == "top_k" else set()
    expected |= {"support/student_mass"} if support.kind == "top_k" and "train/student_nll" in expected else set()
    for metrics in seen:
        assert metrics.keys() == expected
        assert dict(metrics) == pytest.approx(dict(seen[0]), rel=1e-5, abs=1e-6)


def signal_is_shift_invariant(support: Support, signal: Signal) -> bool:
    """The declared property that lets the loss leave the vocabulary unread."""
    return support.kind == "top_k" and getattr(signal, "shift_invariant", False)


# --- closed forms and invariance are shortcuts, no other formula -----------------------------------------------------


@pytest.mark.parametrize(("name", "options"), DIVERGENCES, ids=str)
@every_size
def test_loss_at_equals_autograd_when_closed_form_exists(
    name: str, options: dict[str, Any], chunk: int, tile: int, monkeypatch: pytest.MonkeyPatch
):
    set_sizes(monkeypatch, chunk, tile)
    signal = signals.divergence(name, **options)
    short = fused(problem(signal, supports.full(), kind="everything"))
    long = fused(problem(hidden_from_the_loss(signal), supports.full(), kind="everything"))
    assert_same(short, long)


@pytest.mark.parametrize(("name", "options"), DIVERGENCES, ids=str)
@every_size
def test_loss_at_equals_full_head_when_form_is_renormalised(
    name: str, options: dict[str, Any], chunk: int, tile: int, monkeypatch: pytest.MonkeyPatch
):
    set_sizes(monkeypatch, chunk, tile)
    signal = signals.divergence(name, form="renormalised", **options)
    short = fused(problem(signal, supports.top_k(K), kind="everything", temperature=0.7))
    long = fused(problem(hidden_from_the_loss(signal), supports.top_k(K), kind="everything", temperature=0.7))
    assert short.metrics.keys() < long.metrics.keys()
    assert_same(short, long)


@pytest.mark.parametrize("form", divergences.FORMS)
@pytest.mark.parametrize(("name", "options"), DIVERGENCES, ids=str)
def test_shift_invariant_is_true_only_when_renormalised(name: str, options: dict[str, Any], form: str):
    """What the short path rests on, of the signal itself; and that no other form could take it."""
    signal = signals.divergence(name, form=form, **options)
    ours, theirs = torch.randn(7, K, dtype=torch.float64) - 3.0, torch.randn(7, K, dtype=torch.float64) - 3.0
    one = torch.zeros(7, dtype=torch.float64)
    tokens = Tokens(
        student_logp=one,
        sampler_logp=one,
        teacher_logp=one,
        advantage=one,
        weight=one,
        student_support_logp=ours,
        teacher_support_logp=theirs,
        support_mask=torch.rand(7, K) < 0.8,
    )
    shifted = replace(tokens, student_support_logp=ours - torch.linspace(0.1, 2, 7, dtype=torch.float64)[:, None])
    same = bool(torch.allclose(signal(tokens), signal(shifted), rtol=1e-10, atol=1e-12))
    assert same == signal.shift_invariant == (form == "renormalised")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "signal",
    [
        signals.add(signals.divergence("reverse_kl", form="renormalised"), signals.nll()),
        signals.scale(2.0, signals.divergence("reverse_kl", form="renormalised")),
        signals.switch(lambda t: t.weight > 0.5, signals.divergence("reverse_kl", form="renormalised"), signals.nll()),
    ],
)
def test_loss_at_reads_full_head_when_signals_are_combined(signal: Signal):
    """Its parts may read the normaliser: what one part declares does not hold for the sum."""
    assert not hasattr(signal, "shift_invariant")
    assert not hasattr(signal, "divergence")
    of = problem(signal, supports.top_k(K))
    got = fused(of)
    assert math.isfinite(got.metrics["train/student_nll"])
    assert_same(got, unfused(of))


def test_loss_at_keeps_value_when_signal_returns_input_view():
    """On the whole vocabulary `tokens.student_support_logp[:, 3]` is a view of what `_on_full` overwrites."""
    of = problem(lambda tokens: tokens.student_support_logp[:, 3], supports.full())  # type: ignore[index]
    assert_same(fused(of), unfused(of))


@pytest.mark.parametrize("support", [supports.sampled(), supports.top_k(K), supports.full()], ids=lambda s: s.kind)
def test_loss_at_equals_formula_when_signal_is_student_logp(support: Support):
    of = problem(lambda tokens: tokens.student_logp, support)
    assert_same(fused(of), unfused(of))


@pytest.mark.parametrize("closed", [True, False])
def test_loss_at_gradient_sums_to_zero_over_large_vocabulary(closed: bool):
    """The bias's gradient is the sum over rows. The divergence is large beside it, so that an error of p's sum shows.

    Not divided by the sum of p it sums to -2.9e-3 of its absolute sum with AVX2, of one sign for every seed; divided,
    to at most 4.4e-5 of either sign over three seeds.
    """
    known = signals.divergence("generalised_jsd")
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (5.0 * torch.randn(50_000, generator=generator) for _ in range(2))
    given = problem(known if closed else lambda tokens: known(tokens), supports.full(), kind="bias", n=4)
    head = Head(weight=torch.zeros(50_000, H), bias=ours.requires_grad_(), vocabulary=50_000)
    teacher = Head(weight=torch.zeros(50_000, H + 3), bias=theirs, vocabulary=50_000)
    fused(replace(given, head=replace(head, weight=head.weight.requires_grad_()), teacher_head=teacher))
    assert ours.grad is not None
    total, size = ours.grad.double().sum().abs(), ours.grad.double().abs().sum()
    assert total < 2e-4 * size


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize(
    ("support", "signal"),
    [
        pytest.param(supports.sampled(), signals.nll(), id="nll"),
        pytest.param(supports.top_k(K), signals.divergence("reverse_kl", form="raw"), id="raw"),
        pytest.param(supports.top_k(K), signals.divergence("reverse_kl", form="renormalised"), id="renormalised"),
        pytest.param(supports.full(), signals.divergence("reverse_kl"), id="closed"),
        pytest.param(supports.full(), signals.divergence("generalised_jsd"), id="closed-jsd"),
        pytest.param(supports.full(), signals.divergence("skew_kl"), id="full"),
    ],
)
def test_loss_at_is_finite_when_logits_are_large(support: Support, signal: Signal, size: float):
    of = problem(signal, support, kind="plain")
    of.hidden.data *= size
    got, expected = fused(of), unfused(of)
    assert math.isfinite(got.loss)
    assert_same(got, expected, tolerance=2e-3)  # a logit of 1e4 is rounded to 1e-3


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "signal"),
    [
        pytest.param(supports.sampled(), signals.nll(), id="nll"),
        pytest.param(supports.top_k(K), signals.divergence("reverse_kl"), id="top_k"),
        pytest.param(supports.top_k(K), signals.divergence("forward_kl", form="renormalised"), id="renormalised"),
        pytest.param(supports.full(), signals.divergence("forward_kl"), id="closed"),
    ],
)
def test_loss_at_keeps_bfloat16_gradient_over_many_chunks(
    support: Support, signal: Signal, monkeypatch: pytest.MonkeyPatch
):
    """1,024 positions that push the same way: a sum in bfloat16 stands still after 256 of them."""
    n = 1024
    of = problem(signal, support, n=n)
    of.hidden.data += 2.0
    of.micro.token_ids.fill_(3)
    of = replace(of, hidden=of.hidden.detach().bfloat16().requires_grad_(), head=of.head)
    assert of.head.bias is not None
    head = replace(
        of.head,
        weight=(0.3 * of.head.weight.detach()).bfloat16().requires_grad_(),
        bias=of.head.bias.detach().bfloat16().requires_grad_(),
    )
    of = replace(of, head=head)
    expected = unfused(of)
    errors: dict[int, dict[str, float]] = {}
    for rows in (n, 16, 1):
        width = K * H if signal_is_shift_invariant(support, signal) else V
        set_sizes(monkeypatch, rows * width, 2**20)
        got = fused(of)
        assert got.grads["weight"].dtype == got.grads["hidden"].dtype == torch.bfloat16
        errors[rows] = {name: distance(got.grads[name], grad) for name, grad in expected.grads.items()}
    for name in expected.grads:
        assert errors[n][name] < 2e-2, name
        assert errors[16][name] < 1.2 * errors[n][name] + 1e-3, name
        assert errors[1][name] < 1.2 * errors[n][name] + 1e-3, name
