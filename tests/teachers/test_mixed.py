"""Several teachers on one row: the step against K passes, with weights and prompts of each row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import LETTERS, Gradient, gradient_of, rollout_of, step, tiny

from opd.errors import TeacherError
from opd.loss.step import scored
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.pieces import normalise, signals, supports, teacher_rules
from opd.pieces.needs import needing
from opd.teachers.local import LocalTeacher
from opd.teachers.mixed import MixedTeacher
from opd.types import Batch, Context, Mixture, Prompt, Rollout, ScoreRequest, Support

NAMES = ("small", "large", "capped")
WEIGHTS = ({"small": 3.0, "large": 1.0}, {}, {"capped": 2.0}, {"small": 0.5, "large": 0.25, "capped": 0.25})


def models() -> tuple[LanguageModel, dict[str, LanguageModel]]:
    student = tiny(seed=1, name="student")
    teachers = {"small": tiny(seed=2, hidden=8, name="small"), "large": tiny(seed=3, hidden=24, name="large")}
    return student, {**teachers, "capped": tiny("gemma2", seed=4, name="capped")}


def local(student: LanguageModel, lm: LanguageModel) -> LocalTeacher:
    return LocalTeacher(lm=lm, micro_batch_tokens=40, student_device=student.device)


def mixed(student: LanguageModel, lms: dict[str, LanguageModel], mixture: Mixture) -> MixedTeacher:
    return MixedTeacher(teachers={name: local(student, lm) for name, lm in lms.items()}, mixture=mixture)


def rows(student: LanguageModel, count: int = 6) -> list[Rollout]:
    made: list[Rollout] = []
    for i in range(count):
        ids = [2 + (3 * i + t) % 8 for t in range(1 + (5 * i) % 7)]
        trained = [(i + t) % 4 != 3 for t in range(len(ids))]
        made.append(rollout_of(student, Prompt(id=i, content=LETTERS[i % 8] + "ab"), ids, trained=trained))
    return made


def view(prompt: Prompt, name: str) -> Prompt:
    """What a teacher reads: every one another text."""
    return replace(prompt, content=f"{name[0]}{prompt.content}" if name != "capped" else "hh")


def weighed(rollout: Rollout) -> dict[str, float]:
    """The row's weights, which sum to 1."""
    given = WEIGHTS[rollout.prompt.id % len(WEIGHTS)] or dict.fromkeys(NAMES, 1.0)
    return {name: given.get(name, 0.0) / sum(given.values()) for name in NAMES}


def contexts(rollouts: Any) -> list[Prompt]:
    return [
        replace(
            rollout.prompt,
            views={name: view(rollout.prompt, name) for name in NAMES},
            teacher_weights=WEIGHTS[rollout.prompt.id % len(WEIGHTS)],
        )
        for rollout in rollouts
    ]


def method_of(mixture: Mixture, **changed: Any) -> Method:
    signal = {
        "geometric": signals.divergence("reverse_kl"),
        "arithmetic": signals.divergence("forward_kl"),
        "each": signals.divergence("generalised_jsd", beta=0.3),
    }[mixture]
    settings: dict[str, Any] = {"signal": signal, "support": supports.full(), "temperature": 0.8, "context": contexts}
    return Method(**{**settings, "teacher": teacher_rules.several(mixture), **changed})


def passes(method: Method, student: LanguageModel, lms: dict[str, LanguageModel], rollouts: list[Rollout]) -> Gradient:
    """sum_k of the step with teacher k alone, each row weighed by w_k: K steps of one teacher."""
    expected = {name: torch.zeros_like(p) for name, p in student.trainable().items()}
    loss = 0.0
    for name, lm in lms.items():

        def weight(batch: Batch, name: str = name) -> torch.Tensor:
            return torch.tensor([[weighed(one)[name]] for one in batch.rollouts]).expand(batch.mask.shape)

        def context(rollouts: Any, name: str = name) -> list[Prompt]:
            return [view(rollout.prompt, name) for rollout in rollouts]

        alone = replace(method, weight=needing(weight), context=context, teacher=teacher_rules.external())
        part = step(alone, student, local(student, lm), rollouts)
        loss += part.loss
        for key, grad in part.grads.items():
            expected[key] += grad
    return Gradient(loss=loss, grads=expected)


@pytest.mark.parametrize("tokens", [1, 30, 10**6])
@pytest.mark.parametrize("mixture", ["geometric", "arithmetic", "each"])
def test_mixed_step_equals_passes_whatever_the_split(mixture: Mixture, tokens: int):
    student, lms = models()
    rollouts, method = rows(student), method_of(mixture)
    got = step(method, student, mixed(student, lms, mixture), rollouts, tokens)
    expected = passes(method, student, lms, rollouts)
    assert expected.norm > 0.1
    assert got.distance(expected) < 1e-5
    # A mean's loss is lower by the teachers' disagreement, which has no gradient.
    assert got.loss == pytest.approx(expected.loss, rel=1e-5) if mixture == "each" else got.loss < expected.loss


def test_mixed_step_of_open_form_equals_passes():
    """A signal without a closed form in turn, too."""
    student, lms = models()
    rollouts, method = rows(student), method_of("each", signal=signals.scale(2.0, signals.divergence("skew_kl")))
    got = step(method, student, mixed(student, lms, "each"), rollouts, 30)
    assert got.distance(passes(method, student, lms, rollouts)) < 1e-5


@pytest.mark.parametrize("change", ["weights", "views"])
def test_mixed_step_changes_with_the_context(change: str):
    """The comparisons above can tell."""
    student, lms = models()
    rollouts = rows(student)

    def other(found: Any) -> list[Prompt]:
        changed: dict[str, Any] = {"teacher_weights": {"large": 1.0}} if change == "weights" else {"views": {}}
        return [replace(one, **changed) for one in contexts(found)]

    right, wrong = (
        step(method_of("geometric", context=context), student, mixed(student, lms, "geometric"), rollouts)
        for context in (contexts, other)
    )
    assert right.distance(wrong) > 0.1


def test_mixed_row_without_any_weight_is_left_out():
    student, lms = models()
    rollouts = rows(student)

    def first_has_none(found: Any) -> list[Prompt]:
        return [replace(c, teacher_weights={"small": 0.0} if c.id == 0 else c.teacher_weights) for c in contexts(found)]

    teacher, method = mixed(student, lms, "each"), method_of("each", context=first_has_none)
    got = step(method, student, teacher, rollouts)
    assert got.distance(step(method, student, teacher, rollouts[1:])) < 1e-5
    phase_a = scored(method, teacher, rollouts, method.context(rollouts), method.request(), student.device)
    assert not bool(phase_a.batch.mask[0].any())
    assert phase_a.count == len(rollouts) - 1


def test_mixed_teacher_of_weight_0_reads_no_row(monkeypatch: pytest.MonkeyPatch):
    student, lms = models()
    read: list[int] = []
    score = LocalTeacher.score

    def noted(self: Any, rollouts: Any, found: Any, request: Any) -> Any:
        read.append(len(rollouts))
        return score(self, rollouts, found, request)

    monkeypatch.setattr(LocalTeacher, "score", noted)
    rollouts = rows(student, 4)
    mixed(student, lms, "geometric").score(rollouts, contexts(rollouts), ScoreRequest(support=supports.full()))
    assert read == [3, 3, 3]  # the third row has only "capped", the first only the two others


@pytest.mark.parametrize("support", [supports.full(), supports.sampled(), supports.top_k(3)], ids=lambda s: s.kind)
@pytest.mark.parametrize("mixture", ["geometric", "arithmetic", "each"])
def test_mixed_scores_are_those_of_the_mean(mixture: Mixture, support: Support):
    student, lms = models()
    rollouts = rows(student)
    request = ScoreRequest(support=support, temperature=0.7, entropy=True, top_k=2)
    scores = mixed(student, lms, mixture).score(rollouts, contexts(rollouts), request)
    whole = replace(request, support=supports.full())
    for rollout, score in zip(rollouts, scores, strict=True):
        logps = []
        for name, lm in lms.items():
            teacher = local(student, lm)
            (one,) = teacher.score([rollout], [view(rollout.prompt, name)], whole)
            assert one.teacher_hidden is not None
            logps.append(teacher.head().logits_at(one.teacher_hidden, 0.7).log_softmax(-1))
        share = torch.tensor([weighed(rollout)[name] for name in lms])[:, None, None]
        every = torch.stack(logps)
        arithmetic = (share.log() + every).logsumexp(0)
        mean = (share * every).sum(0).log_softmax(-1) if mixture == "geometric" else arithmetic
        picked = mean.gather(1, rollout.response_ids[:, None])[:, 0]
        torch.testing.assert_close(score.teacher_logp, picked, atol=2e-5, rtol=1e-5)
        assert score.teacher_entropy is not None
        assert score.teacher_top_logp is not None
        torch.testing.assert_close(score.teacher_entropy, torch.special.entr(mean.exp()).sum(-1), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(score.teacher_top_logp, mean.topk(2).values, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"smal": 1.0}, r"weighs the teacher 'smal'.*Did you mean 'small'"),
        ({"small": -1.0}, r"prompt 0 has the teacher weights \{'small': -1.0\}.*not negative"),
        ({"small": float("nan")}, r"finite"),
    ],
)
def test_mixed_teacher_refuses_weights_that_are_none(weights: dict[str, float], message: str):
    student, lms = models()
    rollouts = rows(student, 1)
    context: Context = lambda found: [replace(rollout.prompt, teacher_weights=weights) for rollout in found]  # noqa: E731
    with pytest.raises(TeacherError, match=message):
        mixed(student, lms, "each").score(rollouts, context(rollouts), ScoreRequest(support=supports.full()))


def test_mixture_of_one_teacher_is_that_teacher():
    student, lms = models()
    rollouts = rows(student)
    method = method_of("geometric", context=lambda found: [rollout.prompt for rollout in found])
    one = MixedTeacher(teachers={"capped": local(student, lms["capped"])}, mixture="geometric")
    assert one.lm is lms["capped"]
    alone = step(replace(method, teacher=teacher_rules.external()), student, local(student, lms["capped"]), rollouts)
    assert step(method, student, one, rollouts).distance(alone) < 1e-5


def test_denominator_of_mixed_step_is_that_of_the_rows():
    student, lms = models()
    rollouts, method = rows(student), method_of("each", normalise=normalise.per("token"))
    teacher = mixed(student, lms, "each")
    phase_a = scored(method, teacher, rollouts, method.context(rollouts), method.request(), student.device)
    assert phase_a.count == sum(int(rollout.trained.sum()) for rollout in rollouts)
    got = gradient_of(method, student, teacher, phase_a.batch, phase_a.denominator)
    assert got.distance(passes(method, student, lms, rollouts)) < 1e-5


# --- what it costs --------------------------------------------------------------------------------------------------


def flops(work: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_second_teacher_costs_its_forward_and_output_layer_alone(monkeypatch: pytest.MonkeyPatch):
    """Counted products, so the same on every machine; `benchmarks/several_teachers.py` measures seconds."""
    monkeypatch.setattr("opd.models.products.slow_mkl", lambda: False)
    student = tiny(seed=1, name="student")
    lms = {name: tiny(seed=seed, hidden=32, name=name) for name, seed in (("small", 2), ("large", 3))}
    prompts = [Prompt(id=i, content="abcd") for i in range(4)]
    rollouts = [rollout_of(student, one, [2 + (one.id + t) % 8 for t in range(9)]) for one in prompts]
    method = method_of("geometric", context=lambda found: prompts, temperature=1.0)

    def work(teacher: MixedTeacher) -> None:
        phase_a = scored(method, teacher, rollouts, prompts, method.request(), student.device)
        gradient_of(method, student, teacher, phase_a.batch, phase_a.denominator)

    def forward() -> None:
        teacher = local(student, lms["large"])
        for score in teacher.score(rollouts, prompts, method.request()):
            assert score.teacher_hidden is not None
            teacher.head().logits_at(score.teacher_hidden, 1.0)

    one, two = (mixed(student, dict(list(lms.items())[:k]), "geometric") for k in (1, 2))
    extra = flops(lambda: work(two)) - flops(lambda: work(one))
    assert 0 < extra <= 1.15 * flops(forward)
