"""The load-balancing loss against plain Python and transformers; the load of experts against counting."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.architectures import small_model
from torch import Tensor

from opd import methods
from opd.errors import TrainingError
from opd.loss.balance import Fractions, fractions_of, load_summary
from opd.loss.collate import attach, collate
from opd.loss.step import Job, PhaseA, gradient, loss_part
from opd.loss.token_loss import loss_of
from opd.maths.metrics import Metrics
from opd.models.experts import Decisions, Recording
from opd.models.language_model import LanguageModel
from opd.types import NoTeacher, Prompt, Rollout

SYSTEM = [2, 3, 4, 5, 6, 7, 8, 9] * 3
SEQUENCES = [  # two groups, and rows of several lengths
    ([*SYSTEM, 3], [2, 3, 4]),
    ([*SYSTEM, 3], [5, 9]),
    ([*SYSTEM[::-1], 5, 6], [6, 7, 8, 9, 2, 3]),
    ([*SYSTEM[::-1], 5, 6], [4, 4]),
    ([7, 8, 11], [12, 13, 14, 15]),
]
FACTOR = 0.3


# --- plain Python ----------------------------------------------------------------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(z - max(logits)) for z in logits]
    return [power / sum(powers) for power in powers]


def balance_in_python(layers: list[list[list[float]]], k: int) -> tuple[float, list[list[list[float]]]]:
    """E sum_e f_e P_e over the places of all layers, and its gradient in the logits with f held fixed."""
    places = [logits for layer in layers for logits in layer]
    experts = len(places[0])
    f = [0.0] * experts
    for logits in places:
        for expert in sorted(range(experts), key=lambda e: -logits[e])[:k]:
            f[expert] += 1 / len(places)
    probabilities = [softmax(logits) for logits in places]
    mean = [math.fsum(p[e] for p in probabilities) / len(places) for e in range(experts)]
    loss = experts * math.fsum(f[e] * mean[e] for e in range(experts))
    slopes: list[list[list[float]]] = []
    at = iter(probabilities)
    for layer in layers:
        slopes.append([])
        for _ in layer:
            p = next(at)
            inner = math.fsum(f[e] * p[e] for e in range(experts))
            slopes[-1].append([experts / len(places) * p[j] * (f[j] - inner) for j in range(experts)])
    return loss, slopes


def decisions_of(logits: Tensor, reads: list[int] | None = None, k: int = 2) -> Decisions:
    ones = torch.ones(len(logits), dtype=torch.long) if reads is None else torch.tensor(reads)
    return Decisions(
        router="gate", reads=ones, chosen=logits.detach().topk(k).indices, experts=logits.shape[1], logits=logits
    )


def recording_of(*decisions: Decisions) -> Recording:
    recording = Recording()
    recording.decisions = list(decisions)
    return recording


def test_part_has_value_and_gradient_of_the_formula():
    layers = [torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    loss, slopes = balance_in_python([layer.tolist() for layer in layers], 2)
    leaves = [layer.requires_grad_() for layer in layers]
    decisions = [decisions_of(leaf) for leaf in leaves]
    part = fractions_of(recording_of(*decisions)).part(decisions)
    part.backward()
    assert part.item() == pytest.approx(loss, rel=1e-12)
    for leaf, slope in zip(leaves, slopes, strict=True):
        torch.testing.assert_close(leaf.grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_part_is_k_for_equal_choices():
    logits = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    decisions = [decisions_of(logits)]
    assert fractions_of(recording_of(*decisions)).part(decisions).item() == pytest.approx(2.0)


def test_part_sums_over_micro_batches_and_leaves_out_padding():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = fractions_of(recording_of(decisions_of(logits[:4]), decisions_of(logits[:1])))
    padded = decisions_of(logits, reads=[2, 1, 1, 1, 0, 0])
    expected = whole.part([decisions_of(logits[:4]), decisions_of(logits[:1])])
    assert fractions_of(recording_of(padded)).part([padded]).item() == pytest.approx(expected.item(), rel=1e-12)
    parts = [whole.part([decisions_of(rows)]) for rows in (logits[:3], logits[3:4], logits[:1])]
    assert sum(part.item() for part in parts) == pytest.approx(expected.item(), rel=1e-12)


# --- a whole step ----------------------------------------------------------------------------------------------------


def student_of(kind: str, **settings: Any) -> LanguageModel:
    return LanguageModel(
        model=small_model(kind, **settings), tokenizer=_Ids(), vocabulary=61, stop_ids=frozenset({1}), name=kind
    )


class _Ids:
    def convert_ids_to_tokens(self, index: int) -> str:
        return str(index)


def phase_a_of(lm: LanguageModel) -> PhaseA:
    """The end of phase A of method `sft` on SEQUENCES."""
    method = methods.build("sft", {})
    rollouts = [
        Rollout(
            prompt=Prompt(id=i, content=""),
            sample=0,
            prompt_ids=tuple(prompt),
            response_ids=torch.tensor(response),
            trained=torch.ones(len(response), dtype=torch.bool),
            turn=torch.zeros(len(response), dtype=torch.long),
            finished=True,
            text="",
        )
        for i, (prompt, response) in enumerate(SEQUENCES)
    ]
    scores = NoTeacher().score(rollouts, [rollout.prompt for rollout in rollouts], method.request())
    batch = attach(collate(rollouts, scores, lm.device), method)
    denominator = method.normalise(batch)
    return PhaseA(batch=batch, contexts=(), denominator=denominator, count=denominator.count, trains=True, learned={})


def stepped(lm: LanguageModel, tokens: int, factor: float) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """(loss, gradient by parameter, metrics) of one step."""
    lm.model.zero_grad(set_to_none=True)
    loss, metrics = gradient(methods.build("sft", {}), lm, NoTeacher(), phase_a_of(lm), tokens, router_aux_loss=factor)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in lm.model.named_parameters()}
    return loss, grads, metrics.reduce()


def balance_of_transformers(lm: LanguageModel) -> tuple[float, dict[str, Tensor]]:
    """`load_balancing_loss_func` and its gradient, in float64, from the padded sequences without sharing."""
    import importlib

    model: Any = copy.deepcopy(lm.model).double().eval()
    model.config._experts_implementation = "eager"  # grouped_mm does not take float64
    rows = [[*prompt, *response[:-1]] for prompt, response in SEQUENCES]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    out = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    function = importlib.import_module(type(model).__module__).load_balancing_loss_func
    loss = function(out.router_logits, 4, model.config.num_experts_per_tok, mask)
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return loss.item(), grads


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference, relative to b's norm."""
    square = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return math.sqrt(square / sum(float(g.double().square().sum()) for g in b.values()))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("tokens", [10**6, 70, 1])
def test_gradient_adds_loss_of_transformers(kind: str, tokens: int):
    lm = student_of(kind)
    expected, slopes = balance_of_transformers(lm)
    without, plain, _ = stepped(lm, tokens, 0.0)
    loss, grads, metrics = stepped(lm, tokens, FACTOR)
    assert metrics["experts/balance_loss"] == pytest.approx(expected, rel=1e-5)
    assert loss - without == pytest.approx(FACTOR * expected, rel=1e-4)
    added = {name: (grads[name] - plain[name]) / FACTOR for name in grads}
    assert distance(added, slopes) < 1e-3


def test_gradient_adds_the_same_with_checkpointing():
    lm = student_of("qwen3_moe")
    _, expected, metrics = stepped(lm, 70, FACTOR)
    lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    _, grads, again = stepped(lm, 70, FACTOR)
    assert distance(grads, expected) < 1e-4
    assert again == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "llama"])
def test_loss_part_is_loss_of_bit_for_bit_when_off(kind: str, monkeypatch: pytest.MonkeyPatch):
    lm = student_of(kind)
    loss, grads, metrics = stepped(lm, 70, 0.0)

    def without(student: LanguageModel, teacher: Any, job: Job, load: Any) -> Any:
        return loss_of(job.method, student, job.micro, job.count)

    monkeypatch.setattr("opd.loss.step.loss_part", without)
    assert loss_part is not without
    expected, plain, others = stepped(lm, 70, 0.0)
    assert loss == expected
    assert all(torch.equal(grads[name], plain[name]) for name in plain)
    assert {name: value for name, value in metrics.items() if not name.startswith("experts/")} == others
    assert any(name.startswith("experts/") for name in metrics) == (kind != "llama")


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_gradient_reports_the_load_whatever_the_micro_batches(kind: str):
    lm = student_of(kind)
    choices: dict[tuple[int, int], int] = {}
    layers: list[Any] = [m for m in lm.model.modules() if type(m).__name__.endswith("Experts")]
    for layer, module in enumerate(layers):

        def hook(_: Any, given: Any, layer: int = layer) -> None:
            for expert in given[1].reshape(-1).tolist():
                choices[layer, expert] = choices.get((layer, expert), 0) + 1

        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for prompt, response in SEQUENCES:
            lm.model(input_ids=torch.tensor([[*prompt, *response[:-1]]]))
    counts = [[choices.get((layer, expert), 0) for expert in range(4)] for layer in range(len(layers))]
    shares = [[one / sum(row) for one in row] for row in counts]
    entropies = [-sum(s * math.log(s) for s in row if s) / math.log(4) for row in shares]
    expected = {
        "experts/load_max": 4 * max(max(row) for row in shares),
        "experts/unused_share": sum(one == 0 for row in counts for one in row) / (4 * len(layers)),
        "experts/entropy": sum(entropies) / len(layers),
    }
    for tokens in (10**6, 70, 1):
        metrics = stepped(lm, tokens, 0.0)[2]
        assert {n: v for n, v in metrics.items() if n.startswith("experts/")} == pytest.approx(expected, rel=1e-12)


def test_load_summary_of_known_choices():
    metrics = Metrics()
    metrics.rows(load_summary, layer=[0, 0, 1, 1, 1, 1], expert=[0, 1, 0, 1, 2, 3], choices=[6, 2, 4, 0, 4, 0])
    metrics.rows(load_summary, layer=[0, 0], expert=[0, 1], choices=[0, 4])  # of another process
    expected = {"experts/load_max": 2.0, "experts/unused_share": 2 / 6, "experts/entropy": (1.0 + 0.5) / 2}
    assert metrics.reduce() == pytest.approx(expected)


def test_gradient_refuses_balance_that_cannot_be_pooled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd.models.experts._decisions", lambda *_, **__: None)
    with pytest.raises(TrainingError, match="cannot pool the routers of this model"):
        stepped(student_of("mixtral"), 70, FACTOR)
    assert stepped(student_of("mixtral"), 70, 0.0)[2]["experts/unread"] == 2


def test_part_scales_with_the_places_of_the_step():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    one = fractions_of(recording_of(decisions_of(logits)))
    doubled = Fractions(choices=2 * one.choices, places=2 * one.places)
    assert doubled.part([decisions_of(logits)]).item() == pytest.approx(one.part([decisions_of(logits)]).item() / 2)
