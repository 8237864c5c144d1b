"""A teacher with tokens of its own: losses and gradients of units through the library's path, against the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from support.models import Gradient, batch_of, double, full_logits, prompts_of, rollout_of, step, teacher_of, tiny
from support.pairs import byte_bpe, ids_of, renumbered, sentence_piece
from torch import Tensor

import opd.models.head
from opd import methods
from opd.errors import AlignmentError, ConfigError, TrainingError
from opd.evaluation import diagnostics
from opd.evaluation.buckets import Buckets
from opd.evaluation.compare import check_comparable
from opd.loss.collate import attach, has_trained, split
from opd.loss.token_loss import loss_of
from opd.loss.unit_loss import Cut, whole_chunks
from opd.maths import divergences
from opd.method import Method
from opd.models.alignment import pair_of, retokenise
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.parallel import ALONE
from opd.pieces import filters, signals, supports
from opd.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd.types import Rollout, ScoreRequest, Shared

pytestmark = pytest.mark.numeric

SMALL = ("a", "b", "c", "d")
EXACT = 1e-6
ROUNDING = 2e-5
BUCKETS = Buckets.over(64, 64)


def letters(*merges: str, special: Sequence[str] = ("<pad>", "<eos>"), turned: bool = False) -> Any:
    """Characters a to d as SentencePiece knows them, with merges, and no bytes: a vocabulary of a few tokens."""
    from support.pairs import wrapped
    from tokenizers import Tokenizer, decoders
    from tokenizers import models as token_models

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    text = [*SMALL, *("".join(pair) for pair in pairs)]
    tokens = [*special, *(reversed(text) if turned else text)]
    core = Tokenizer(token_models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    return wrapped(core, special)


STUDENT = letters("a b", "c d")
TEACHER = letters("b c", "bc d", "c d", turned=True)
OURS, THEIRS = tiny(tokenizer=STUDENT, name="student"), tiny(tokenizer=TEACHER, seed=1, hidden=24, name="teacher")


def response(*pieces: str, lm: LanguageModel = OURS, prompt: str = "ad", **columns: Any) -> Rollout:
    return rollout_of(lm, prompts_of(prompt)[0], ids_of(lm.tokenizer, *pieces), **columns)


# ab|cd and a|bcd, then c of both; a|b|c and a|bc
SPANS = [
    response("ab", "cd", "c", "<eos>"),
    response("a", "b", "c", prompt="b"),
    response("d", "a", "b", "cd", "b", prompt="cc"),
]


def reference(
    rollouts: Sequence[Rollout],
    of: Callable[..., float],
    student: LanguageModel = OURS,
    teacher: LanguageModel = THEIRS,
) -> Callable[[list[Tensor]], float]:
    """Student logits [T, V] of each response -> the step's loss, units by the oracle, every number in plain Python."""
    pair = pair_of(student.tokenizer, teacher.tokenizer)
    judge = double(teacher)

    def loss(logits: list[Tensor]) -> float:
        total, tokens = 0.0, 0
        for rollout, z in zip(rollouts, logits, strict=True):
            ids = rollout.response_ids.tolist()
            end = ids[-1] == student.tokenizer.eos_token_id
            text = student.tokenizer.decode(ids[: len(ids) - end])
            theirs = [*teacher.tokenizer(text, add_special_tokens=False).input_ids]
            pieces = [student.tokenizer.decode([i]).encode() for i in ids]
            others = [teacher.tokenizer.decode([i]).encode() for i in theirs]
            theirs, others = theirs + [teacher.tokenizer.eos_token_id] * end, others + [b"<eos>"] * end
            with torch.no_grad():
                q = full_logits(
                    judge, render(rollout.prompt, teacher.tokenizer), torch.tensor(theirs), teacher.vocabulary
                ).tolist()
            for a, b in oracle.aligned_units(pieces, others):
                total += of(
                    [z[i].tolist() for i in a],
                    [ids[i] for i in a],
                    [q[j] for j in b],
                    [theirs[j] for j in b],
                    list(pair.shared.items()),
                )
            tokens += len(ids)
        return total / tokens

    return loss


def logits_of(rollouts: Sequence[Rollout], lm: LanguageModel = OURS) -> list[Tensor]:
    model = double(lm)
    with torch.no_grad():
        return [full_logits(model, r.prompt_ids, r.response_ids, lm.vocabulary) for r in rollouts]


def finite_differences(
    rollouts: Sequence[Rollout], loss: Callable[[list[Tensor]], float], lm: LanguageModel = OURS, h: float = 1e-5
) -> tuple[float, Gradient]:
    """The loss, and its gradient: with respect to each logit by central differences, then through the model."""
    model = double(lm)
    made = [full_logits(model, r.prompt_ids, r.response_ids, lm.vocabulary) for r in rollouts]
    plain = [z.detach().clone() for z in made]
    slopes = [torch.zeros_like(z) for z in plain]
    for z, slope in zip(plain, slopes, strict=True):
        for t, v in itertools.product(*map(range, z.shape)):
            kept = float(z[t, v])
            both: list[float] = []
            for side in (h, -h):
                z[t, v] = kept + side
                both.append(loss(plain))
            z[t, v] = kept
            slope[t, v] = (both[0] - both[1]) / (2 * h)
    torch.autograd.backward(made, slopes)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return loss(plain), Gradient(loss=math.nan, grads=grads)


def taught(name: str, options: dict[str, Any] | None = None, lm: LanguageModel = THEIRS) -> tuple[Method, Any]:
    method = methods.build(name, options or {})
    return method, teacher_of(method, OURS, lm)


def merged_distance(z: Any, ids: Any, q: Any, others: Any, shared: Any) -> float:
    return oracle.rank_distance(oracle.merged(z, ids), oracle.merged(q, others))


def shared_only(z: Any, ids: Any, q: Any, others: Any, shared: Any) -> float:
    alone = len(ids) == len(others) == 1 and (ids[0], others[0]) in shared
    return oracle.unit_kl(z, ids, q, others, shared) if alone else 0.0


def hybrid(z: Any, ids: Any, q: Any, others: Any, shared: Any) -> float:
    p, t = oracle.merged(z, ids), oracle.merged(q, others)
    share = len(shared) / len(t)
    ours, theirs = [s for s, _ in shared], [s for _, s in shared]
    same = oracle.reverse_kl([math.log(p[v]) for v in ours], [math.log(t[v]) for v in theirs])
    rest = [v for v in range(len(p)) if v not in ours], [v for v in range(len(t)) if v not in theirs]
    return share * same + (1 - share) * oracle.rank_distance([p[v] for v in rest[0]], [t[v] for v in rest[1]])


# --- the maths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "of"),
    [
        ("simct", {}, oracle.unit_kl),
        ("simct", {"spans": False}, shared_only),
        ("uld", {}, merged_distance),
        ("uld", {"matched": "reverse_kl"}, hybrid),
    ],
    ids=["simct", "shared", "uld", "hybrid"],
)
def test_unit_losses_equal_oracle(name: str, options: dict[str, Any], of: Callable[..., float]):
    method, teacher = taught(name, options)
    got = step(method, OURS, teacher, list(SPANS))
    value, expected = finite_differences(SPANS, reference(SPANS, of))
    assert got.loss == pytest.approx(value, rel=ROUNDING)
    assert expected.norm > 1e-2
    assert got.distance(expected) < ROUNDING


def test_simct_gradient_reaches_all_positions_of_span():
    method, teacher = taught("simct")
    rollout = response("a", "b", "cd", trained=[True] * 3)  # one unit: a|b|cd and a|bcd -> a, then b|cd
    batch = attach(batch_of(method, OURS, teacher, [rollout]), method)
    assert batch.units is not None
    assert batch.units.size[0].tolist() == [1, 2, 0]
    (micro,) = split(OURS, batch, method.normalise(batch), 10**6)
    hidden: list[Tensor] = []
    import opd.loss.token_loss

    kept = opd.loss.token_loss.hidden_of

    def recorded(lm: LanguageModel, one: Any) -> Tensor:
        hidden.append(kept(lm, one))
        hidden[-1].retain_grad()
        return hidden[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd.loss.token_loss, "hidden_of", recorded)
        loss, _ = loss_of(method, OURS, micro, 3.0, teacher.head())
    loss.backward()
    OURS.model.zero_grad(set_to_none=True)
    assert hidden[0].grad is not None
    assert bool((hidden[0].grad != 0).any(-1).all())


def test_simct_equals_reverse_kl_when_tokens_are_renumbered():
    """Every token is a unit, read again by the teacher's tokenizer and compared under other ids."""
    tokenizer = letters("b c", "bc d", turned=False)
    student, teacher = tiny(tokenizer=tokenizer), tiny(tokenizer=tokenizer, seed=1, hidden=24)
    moved = renumbered(teacher, letters("b c", "bc d", turned=True))
    assert not pair_of(tokenizer, moved.tokenizer).same
    rows = [
        response("bcd", "a", "bc", "<eos>", lm=student),
        response("a", "c", "b", "a", "bcd", "d", lm=student, prompt="b"),
    ]
    exact = methods.build("reverse_kl", {"average": "token"})
    expected = step(exact, student, teacher_of(exact, student, teacher), rows)
    for other in (moved, teacher):
        method = methods.build("simct", {})
        got = step(method, student, teacher_of(method, student, other), rows)
        assert got.loss == pytest.approx(expected.loss, abs=EXACT)
        assert got.distance(expected) < EXACT


def test_reverse_kl_never_rises_when_entries_are_merged():
    """Coarser units lose information: the data processing inequality, on the library's own divergence."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        p, q = torch.randn(2, 9, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
        into = torch.randint(4, (9,), generator=generator)
        coarse = [torch.stack([one[into == k].logsumexp(0) for k in into.unique()]) for one in (p, q)]
        assert divergences.reverse_kl(*coarse) <= divergences.reverse_kl(p, q) + 1e-12


@pytest.mark.parametrize("entries", [1, 30])
def test_step_is_independent_of_chunks_and_micro_batches(entries: int, monkeypatch: pytest.MonkeyPatch):
    for name in ("simct", "uld"):
        method, teacher = taught(name)
        whole = step(method, OURS, teacher, list(SPANS))
        with monkeypatch.context() as patch:
            patch.setattr(opd.models.head, "CHUNK_ENTRIES", entries)
            for micro_batch_tokens in (1, 10**6):
                parts = step(method, OURS, teacher, list(SPANS), micro_batch_tokens)
                assert parts.loss == pytest.approx(whole.loss, rel=EXACT)
                assert parts.distance(whole) < ROUNDING


def test_whole_chunks_cut_no_unit():
    size = torch.tensor([1, 3, 0, 0, 0, 2, 0, 1])  # token 4 is in no unit
    assert whole_chunks(size, 1) == [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 7), slice(7, 8)]
    assert whole_chunks(size, 4) == [slice(0, 4), slice(4, 8)]
    assert whole_chunks(size, 100) == [slice(0, 8)]
    assert whole_chunks(size[:0], 4) == []
    cut = Cut.at(size)
    assert cut.token.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert cut.of.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert cut.mean(torch.arange(8.0)).tolist() == [0.0, 2.0, 5.5, 7.0]


def test_shared_first_lists_shared_ids_first():
    shared = Shared(student=torch.tensor([3, 1]), teacher=torch.tensor([0, 4]))
    assert shared.first(shared.student, 5).tolist() == [3, 1, 0, 2, 4]


# --- units and tokens -----------------------------------------------------------------------------------------------


def weighted(weights: Sequence[float], **options: Any) -> Method:
    """The weight of token t of every response."""
    return replace(
        methods.build("simct", options),
        weight=lambda batch: torch.tensor(weights)[: batch.mask.shape[1]].expand(batch.mask.shape),
    )


def test_unit_weight_is_mean_of_token_weights():
    rows = [response("a", "b", "cd", "d")]  # a; b|cd and bcd; d
    plain = methods.build("simct", {})
    teacher = teacher_of(plain, OURS, THEIRS)

    def loss(weights: list[float]) -> float:
        return step(weighted(weights), OURS, teacher, rows).loss

    first, both, last = loss([1, 0, 0, 0]), loss([0, 1, 1, 0]), loss([0, 0, 0, 1])
    assert loss([0, 1, 0, 0]) == pytest.approx(both / 2, rel=ROUNDING)
    assert loss([2, 3, 1, 0.5]) == pytest.approx(2 * first + 2 * both + 0.5 * last, rel=ROUNDING)
    assert step(plain, OURS, teacher, rows).loss == pytest.approx(first + both + last, rel=ROUNDING)


def test_unit_is_left_out_when_token_is_not_trained():
    method, teacher = taught("simct")
    whole = [response("a", "b", "cd", "d")]
    part = [response("a", "b", "cd", "d", trained=[True, False, True, True])]
    batch = batch_of(method, OURS, teacher, part)
    assert batch.units is not None
    assert batch.units.size[0].tolist() == [1, 0, 0, 1]
    assert batch.units.inside[0].tolist() == [True, False, False, True]
    found = diagnostics.step_metrics(batch, method, 0, buckets=BUCKETS).reduce()
    assert found["units/not_compared_share"] == pytest.approx(1 / 3)
    assert found["units/coverage"] == pytest.approx(2 / 4)  # of a, cd and d
    expected = 4 / 3 * step(weighted([1, 0, 0, 1]), OURS, teacher, whole).loss  # of three tokens, not four
    assert step(method, OURS, teacher, part).loss == pytest.approx(expected, rel=ROUNDING)


def test_unit_is_left_out_when_filter_drops_token():
    method = replace(methods.build("simct", {}), filter=filters.without_tokens(["b"])).with_tokenizer(STUDENT)
    rows = method.filter([response("a", "b", "cd", "d")])
    batch = batch_of(method, OURS, teacher_of(method, OURS, THEIRS), rows)
    assert batch.units is not None
    assert batch.mask[0].tolist() == [True, False, True, True]
    assert batch.units.size[0].tolist() == [1, 0, 0, 1]


def test_teacher_logp_sums_to_log_prob_of_text():
    method, teacher = taught("simct")
    rollout = response("ab", "cd", "c", "<eos>")
    batch = batch_of(method, OURS, teacher, [rollout])
    ids = [*THEIRS.tokenizer("abcdc", add_special_tokens=False).input_ids, THEIRS.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = full_logits(double(THEIRS), render(rollout.prompt, TEACHER), torch.tensor(ids), THEIRS.vocabulary)
    said = float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    assert float(batch.teacher_logp.sum()) == pytest.approx(said, abs=1e-4)
    assert float(batch.teacher_logp[0, 0]) == float(batch.teacher_logp[0, 1]), "shared out evenly in a unit"


def test_units_coverage_is_reported_beside_shared_coverage():
    rows = [response("ab", "cd", "c", "<eos>")]  # abcd is one unit, c another
    for options, coverage in (({}, 1.0), ({"spans": False}, 1 / 5)):
        method, teacher = taught("simct", options)
        found = diagnostics.step_metrics(batch_of(method, OURS, teacher, rows), method, 0, buckets=BUCKETS).reduce()
        assert found["units/coverage"] == pytest.approx(coverage)
        assert found["units/shared_coverage"] == pytest.approx(1 / 5)
        assert found["units/per_token"] == pytest.approx((3 if coverage == 1 else 2) / 4)
        assert found["units/unscored_share"] == 0.0


def test_least_mass_empties_and_counts_rows():
    rows = list(SPANS)
    _, teacher = taught("simct")

    def found(least: float) -> tuple[float, dict[str, float]]:
        method = methods.build("simct", {"least_mass": least})
        batch = attach(batch_of(method, OURS, teacher, rows), method)
        denominator = method.normalise(batch)
        (micro,) = split(OURS, batch, denominator, 10**6)
        loss, metrics = loss_of(method, OURS, micro, denominator.count, teacher.head())
        return loss.item(), metrics.reduce()

    everything, metrics = found(0.0)
    assert metrics["support/empty_share"] == 0.0
    assert 0 < metrics["support/teacher_mass"] < 1.2
    some, counted = found(0.95)
    assert 0 < counted["support/empty_share"] < 1
    assert some < everything
    none, counted = found(1.0)
    assert (none, counted["support/empty_share"]) == (0.0, 1.0)
    assert counted["units/signal"] == 0.0


# --- what cannot be scored ------------------------------------------------------------------------------------------

BYTES = tiny(tokenizer=byte_bpe(special=("<pad>", "<eos>", "<only>")), name="bytes")
PIECES = tiny(tokenizer=sentence_piece("a b", characters="abc🙂"), seed=1, hidden=24, name="pieces")


def test_simct_drops_invalid_bytes_and_trains_rest():
    half = "🙂".encode()[:2]
    alone = {piece: i for i, piece in pair_of(BYTES.tokenizer, PIECES.tokenizer).student.pieces.items()}
    ids = [alone[bytes([b])] for b in b"abc" + half + b"c"]
    (prompt,) = prompts_of("c")
    rows = [rollout_of(BYTES, prompt, ids), rollout_of(BYTES, prompt, ids_of(BYTES.tokenizer, "<only>", "<only>"))]
    method = methods.build("simct", {})
    teacher = teacher_of(method, BYTES, PIECES)
    batch = batch_of(method, BYTES, teacher, rows)
    assert batch.mask.tolist() == [[True, True, True, False, False, True], [False] * 6]
    assert bool(batch.teacher_logp[~batch.mask].isnan().all())
    found = diagnostics.step_metrics(batch, method, 0, buckets=BUCKETS).reduce()
    assert found["units/unscored_share"] == pytest.approx(4 / 8)
    assert found["units/coverage"] == pytest.approx(4 / 6)
    got = step(method, BYTES, teacher, rows)
    assert got.norm > 1e-3
    assert all(bool(grad.isfinite().all()) for grad in got.grads.values())


def test_has_trained_raises_training_error_when_unscored():
    (prompt,) = prompts_of("c")
    rows = [rollout_of(BYTES, prompt, ids_of(BYTES.tokenizer, "<only>"))]
    method = methods.build("simct", {})
    batch = batch_of(method, BYTES, teacher_of(method, BYTES, PIECES), rows)
    with pytest.raises(TrainingError, match=r"None of this step's 1 responses .* could score none of their tokens"):
        has_trained(batch, method, ALONE)


def test_teacher_entropy_is_that_before_unit():
    method, teacher = taught("simct")
    rollout = response("ab", "cd", "c")
    scores = teacher.score(
        [rollout], [rollout.prompt], ScoreRequest(support=method.support, temperature=1.0, entropy=True)
    )[0]
    reading = retokenise(rollout.response_ids.tolist(), teacher.pair)
    logits = full_logits(
        double(THEIRS), render(rollout.prompt, TEACHER), torch.tensor(reading.teacher_ids), THEIRS.vocabulary
    )
    spread = torch.special.entr(logits.softmax(-1)).sum(-1)
    first = [unit.teacher.start for unit in reading.units for _ in unit.student]
    assert scores.teacher_entropy.tolist() == pytest.approx(spread[first].tolist(), rel=1e-4)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_score_refuses_token_support_when_tokenizers_differ():
    _, teacher = taught("simct")
    rollout = SPANS[0]
    with pytest.raises(ConfigError, match=r"the support 'top_k'.* Give the method support=units\(\)"):
        teacher.score([rollout], [rollout.prompt], ScoreRequest(support=supports.top_k(3), temperature=1.0))


def test_check_comparable_refuses_cross_tokenizer_teacher():
    _, teacher = taught("simct")
    assert isinstance(teacher, CrossTokenizerTeacher)
    with pytest.raises(ConfigError, match=r"evaluate\.kl compares .*another tokenizer.* Turn the comparison off"):
        check_comparable(teacher, "evaluate.kl")
    check_comparable(teacher.local, "evaluate.kl")


def test_reverse_kl_refuses_two_tokenizers_and_names_simct():
    with pytest.raises(AlignmentError, match=r"or use a method for two tokenizers, such as simct"):
        teacher_of(methods.build("reverse_kl", {}), OURS, THEIRS)


def test_by_rank_refuses_matched_when_vocabularies_are_equal():
    method = Method(support=supports.full(), signal=signals.by_rank("reverse_kl"))
    same = tiny(tokenizer=STUDENT, seed=2)
    with pytest.raises(ConfigError, match=r"`matched` compares the tokens of two vocabularies"):
        step(method, OURS, teacher_of(method, OURS, same), list(SPANS))


@pytest.mark.parametrize(("span", "mass"), [("column", -0.1), ("column", 1.5), ("product", 0.5)])
def test_units_refuses_wrong_least_mass(span: Any, mass: float):
    with pytest.raises(ConfigError, match=rf"between 0 and 1, got {mass} with span '{span}'"):
        supports.units(span, least_mass=mass)


def test_by_rank_ignores_order_of_tokens():
    """Two vocabularies of one size, both distributions the same but for the order: no loss and no gradient."""
    rank = signals.by_rank()
    from opd.types import Tokens

    p = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    zero = torch.zeros(1)
    common: dict[str, Any] = {
        "student_logp": zero,
        "sampler_logp": zero,
        "teacher_logp": zero,
        "advantage": zero,
        "weight": zero,
    }
    value = rank(Tokens(**common, student_support_logp=p, teacher_support_logp=torch.tensor([[0.2, 0.5, 0.3]]).log()))
    value.sum().backward()
    assert value.tolist() == [0.0]
    assert p.grad is not None
    assert p.grad.tolist() == [[0.0, 0.0, 0.0]]
    longer = torch.tensor([[0.1, 0.5, 0.2, 0.2]]).log()
    value = rank(Tokens(**common, student_support_logp=p, teacher_support_logp=longer))
    assert value.tolist() == pytest.approx([0.0 + 0.1 + 0.0 + 0.1])
