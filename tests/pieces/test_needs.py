"""Numbers of phase A that cost something to make: who reads them gets them, right; nobody else pays."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import double, full_logits
from support.runs import CHARACTERS, sums, tiny_model
from torch import Tensor

import opd
from opd.errors import ConfigError
from opd.method import Method
from opd.models import wrapping
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.pieces import signals, sources, supports
from opd.pieces.credit import group_reward, no_credit
from opd.pieces.needs import (
    Input,
    Need,
    Needs,
    Piece,
    Reads,
    Trait,
    needing,
    needing_tokenizer,
    needs_of,
    with_tokenizer,
)
from opd.pieces.normalise import per
from opd.pieces.weights import every_token, times
from opd.recipe.schema import ModelSpec
from opd.types import Batch, Denominator, Record, Rollout, Source, Support

PADDED = 3  # length of the longest response below


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def model(seed: int) -> Any:
    return load_model(ModelSpec(**tiny_model(seed)), name="tiny").model


def wrapped(seed: int) -> LanguageModel:
    return wrapping.wrap(model(seed), character_tokenizer(CHARACTERS))


@dataclass
class Reader:
    """A weight (or credit, or normalisation) that keeps the batches that it is given; `declares` None: nothing said."""

    declares: tuple[Reads, ...] | None = None
    batches: list[Batch] = field(default_factory=list)

    def weight(self) -> Any:
        def weight(batch: Batch) -> Tensor:
            self.batches.append(batch)
            return torch.ones(batch.mask.shape)

        return weight if self.declares is None else needing(weight, *self.declares)

    def normalise(self) -> Any:
        def normalise(batch: Batch) -> Denominator:
            self.batches.append(batch)
            return Denominator(count=float(batch.mask.sum()), share=batch.mask.float())

        return normalise if self.declares is None else needing(normalise, *self.declares)

    @property
    def batch(self) -> Batch:
        (batch,) = self.batches
        return batch


def method_of(support: Support, **pieces: Any) -> Method:
    signal = signals.policy_gradient(signals.log_ratio) if support.kind == "sampled" else signals.divergence()
    return Method(support=support, signal=signal, **pieces)


def train(method: Method, **stage: Any) -> opd.Run:
    """One step of a new student (seed 2) with a teacher (seed 1); no sample files, for which scores are made too."""
    settings = {
        "steps": 1,
        "prompts_per_step": 4,
        "sampling": {"max_completion_length": PADDED},
        "samples_every": 0,
        **stage,
    }
    return opd.distill(
        student=model(2),
        teacher=model(1),
        tokenizer=character_tokenizer(CHARACTERS),
        prompts=sums(0, 6),
        method=method,
        quiet=True,
        **settings,
    )


def log_probs(lm: LanguageModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """The model's own log-probs [T, V] in float64."""
    with torch.no_grad():
        logits = full_logits(double(lm), rollout.prompt_ids, rollout.response_ids, lm.vocabulary)
    return (logits / temperature).log_softmax(-1)


def assert_column(column: Tensor | None, batch: Batch, expected: list[Tensor]) -> None:
    """A column [B, T] holds `expected` at each response's tokens, and NaN behind its end."""
    assert column is not None
    assert column.shape == batch.mask.shape
    for i, values in enumerate(expected):
        torch.testing.assert_close(column[i, : len(values)].double(), values, atol=1e-5, rtol=1e-5)
        assert bool(column[i, len(values) :].isnan().all())


def assert_sampled(batch: Batch) -> None:
    lm = wrapped(1)
    assert_column(
        batch.teacher_logp,
        batch,
        [log_probs(lm, r).gather(-1, r.response_ids[:, None])[:, 0] for r in batch.rollouts],
    )


def entropies(lm: LanguageModel, batch: Batch, temperature: float = 1.0) -> list[Tensor]:
    logs = [log_probs(lm, r, temperature) for r in batch.rollouts]
    return [-(log_p.exp() * log_p).sum(-1) for log_p in logs]


# --- the sampled tokens' log-probs ----------------------------------------------------------------------------------


PLACES = {
    "weight": lambda reader: {"weight": reader.weight()},
    "times": lambda reader: {"weight": times(every_token(), reader.weight())},
    "credit": lambda reader: {"credit": reader.weight()},
    "normalise": lambda reader: {"normalise": reader.normalise()},
}
every_place = pytest.mark.parametrize("place", PLACES)


@every_place
@pytest.mark.parametrize("declares", [None, (Reads.TEACHER_LOGP,), (Reads.TEACHER_LOGP, Reads.TEACHER_ENTROPY)])
def test_teacher_logp_is_given_when_read_on_full_support(place: str, declares: tuple[Reads, ...] | None):
    """A piece that says nothing is a user's, and may read them."""
    reader = Reader(declares)
    train(method_of(supports.full(), **PLACES[place](reader)))
    assert_sampled(reader.batch)


@every_place
@pytest.mark.parametrize("declares", [(), (Reads.STUDENT_ENTROPY,)])
def test_teacher_logp_is_nan_when_unread_on_full_support(place: str, declares: tuple[Reads, ...]):
    reader = Reader(declares)
    train(method_of(supports.full(), **PLACES[place](reader)))
    assert bool(reader.batch.teacher_logp.isnan().all())
    assert reader.batch.teacher_entropy is None
    assert (reader.batch.student_entropy is None) == (Reads.STUDENT_ENTROPY not in declares)


def test_teacher_entropy_brings_teacher_logp_on_full_support():
    reader = Reader((Reads.TEACHER_ENTROPY,))
    train(method_of(supports.full(), weight=reader.weight()))
    assert_sampled(reader.batch)


@pytest.mark.parametrize("support", [supports.sampled(), supports.top_k(3)], ids=lambda s: s.kind)
def test_teacher_logp_is_given_on_other_supports(support: Support):
    reader = Reader(())
    train(method_of(support, weight=reader.weight()))
    assert_sampled(reader.batch)


def test_samples_hold_teacher_logp_and_change_no_metric():
    reader = Reader(())
    method = method_of(supports.full(), weight=reader.weight())
    shown, hidden = train(method, steps=2, samples_every=2), train(method, steps=2)
    assert shown.metrics == hidden.metrics
    assert all(len(row["teacher_logp"]) == len(row["response_ids"]) for row in shown.samples)
    assert [bool(batch.teacher_logp.isnan().all()) for batch in reader.batches] == [False, False, True, True]


LOGP, MINE, THEIRS = Reads.TEACHER_LOGP, Reads.STUDENT_ENTROPY, Reads.TEACHER_ENTROPY


def plain(batch: Batch) -> Tensor:
    """A bare function, as users write them."""
    return batch.mask.float()


NEEDY, SILENT = needing(plain, THEIRS), needing(plain)


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (plain, {LOGP}),
        (NEEDY, {THEIRS}),
        (SILENT, set()),
        (every_token(), set()),
        (no_credit(), set()),
        (group_reward(), set()),
        (per("token"), set()),
        (per("sequence"), set()),
        (per(3), set()),
        (times(), set()),
        (times(plain), {LOGP}),
        (times(every_token(), plain), {LOGP}),
        (times(times(plain), NEEDY), {LOGP, THEIRS}),
        (times(SILENT, every_token()), set()),
        (times(needing(plain, MINE), NEEDY), {MINE, THEIRS}),
    ],
)
def test_needs_of_gives_reads_of_piece(piece: Any, expected: set[Reads]):
    assert {number for number in (LOGP, MINE, THEIRS) if needs_of(piece).reads(number)} == expected


def test_record_unites_reads_of_pieces():
    silent = method_of(supports.full())
    assert silent.record() == Record()
    assert not any(silent.reads(number) for number in (LOGP, MINE, THEIRS))
    needy = needing(lambda batch: torch.ones(batch.mask.shape), MINE)
    for pieces in ({"weight": times(needy)}, {"credit": needy}, {"normalise": needy}, {"memory": {"needy": needy}}):
        method = method_of(supports.top_k(4, by="union"), **pieces)
        assert method.record() == Record(top_k=4, entropy=True)


# --- what a piece declares -------------------------------------------------------------------------------------------


def test_per_refuses_another_word():
    word: Any = "tokens"
    with pytest.raises(ConfigError, match="per 'token', per 'sequence' or per a number of tokens, got 'tokens'"):
        per(word)


def test_needs_union_takes_larger_numbers():
    one = Needs(columns=frozenset({"answer"}), inputs=frozenset({Input.REWARD}), top_k=3, first_look=2)
    other = Needs(inputs=frozenset({Input.GROUP}), traits=frozenset({Trait.FILTERS}), top_k=5, student_writes=True)
    both = Needs(
        columns=frozenset({"answer"}),
        inputs=frozenset({Input.REWARD, Input.GROUP}),
        traits=frozenset({Trait.FILTERS}),
        top_k=5,
        first_look=2,
        student_writes=True,
    )
    assert one | other == other | one == both
    assert one | Needs() == one


def test_needing_sorts_its_members():
    piece = needing(plain, Input.REWARD, LOGP, Trait.FILTERS, columns=["answer"], top_k=2, response_tokens=9)
    assert piece.needs == Needs(
        columns=frozenset({"answer"}),
        inputs=frozenset({Input.REWARD}),
        batch=frozenset({LOGP}),
        traits=frozenset({Trait.FILTERS}),
        top_k=2,
        response_tokens=9,
    )
    assert piece.call is plain
    assert needing(plain, "reward").needs == needing(plain, Input.REWARD).needs  # type: ignore[arg-type]
    members: list[Need] = [*Input, *Reads, *Trait]
    assert all(one in needing(plain, one).needs for one in members)


@pytest.mark.parametrize(("name", "near"), [("rewrad", "reward"), ("teacher_entrpy", "teacher_entropy")])
def test_needing_refuses_unknown_member(name: Any, near: str):
    with pytest.raises(
        ConfigError, match=rf"declares '{name}', which is not a member .* Did you mean '{near}'\? Declare columns"
    ):
        needing(plain, name)


def test_turned_swaps_divergence_traits():
    towards = needing(plain, Trait.MINIMISES_DIVERGENCE, Trait.FILTERS, top_k=2).needs
    assert towards.turned() == needing(plain, Trait.MAXIMISES_DIVERGENCE, Trait.FILTERS, top_k=2).needs
    assert towards.turned().turned() == towards


def test_needing_tokenizer_refuses_call_without_tokenizer():
    piece = needing_tokenizer("mine", lambda tokenizer: lambda batch: tokenizer, Trait.LOOKS_AT_SAMPLED_TOKEN)
    with pytest.raises(ConfigError, match=r"^mine needs the student's tokenizer, .* method\.with_tokenizer\(tok"):
        piece(None)
    assert Trait.LOOKS_AT_SAMPLED_TOKEN in piece.needs
    assert with_tokenizer(piece, "tokens")(None) == "tokens"
    assert with_tokenizer(plain, "tokens") is plain
    assert isinstance(with_tokenizer(SILENT, "tokens"), Piece)


# --- entropies ------------------------------------------------------------------------------------------------------


SOURCES: dict[str, Source] = {
    "student": sources.on_policy(),
    "dataset": sources.dataset(),
    "teacher": sources.teacher_writes(),
}
every_source = pytest.mark.parametrize("source", SOURCES)


@every_source
@every_place
def test_entropy_equals_that_of_full_distribution(source: str, place: str):
    reader = Reader((Reads.STUDENT_ENTROPY, Reads.TEACHER_ENTROPY))
    train(method_of(supports.full(), source=SOURCES[source], **PLACES[place](reader)))
    batch = reader.batch
    assert_column(batch.student_entropy, batch, entropies(wrapped(2), batch))
    assert_column(batch.teacher_entropy, batch, entropies(wrapped(1), batch))


@every_source
@pytest.mark.parametrize(
    "support",
    [supports.sampled(), supports.top_k(3), supports.top_k(3, by="student"), supports.top_k(3, by="union")],
    ids=lambda s: f"{s.kind}-{s.by}",
)
def test_entropy_is_given_beside_any_support(source: str, support: Support):
    reader = Reader((Reads.STUDENT_ENTROPY, Reads.TEACHER_ENTROPY))
    train(method_of(support, source=SOURCES[source], weight=reader.weight()))
    batch = reader.batch
    assert_column(batch.student_entropy, batch, entropies(wrapped(2), batch))
    assert_column(batch.teacher_entropy, batch, entropies(wrapped(1), batch))
    assert (batch.support_ids is None) == (support.kind == "sampled")
    if support.student_top_k:  # both come from one look at the student
        assert batch.support_ids is not None
        for i, rollout in enumerate(batch.rollouts):
            assert rollout.student_top_ids is not None
            top = log_probs(wrapped(2), rollout).topk(3).values
            listed = log_probs(wrapped(2), rollout).gather(-1, rollout.student_top_ids)
            torch.testing.assert_close(listed, top, atol=1e-5, rtol=0)
            assert batch.support_ids[i, : len(rollout.response_ids)].shape[0] == len(rollout.response_ids)


@every_source
@pytest.mark.parametrize("support", [supports.sampled(), supports.top_k(3, by="student")], ids=lambda s: s.kind)
def test_entropy_is_given_only_when_declared(source: str, support: Support):
    """Also where the student's top tokens have to be found for a response that it did not write."""
    for declares in ((Reads.STUDENT_ENTROPY,), (Reads.TEACHER_ENTROPY,)):
        reader = Reader(declares)
        train(method_of(support, source=SOURCES[source], weight=reader.weight()))
        assert (reader.batch.student_entropy is not None) == (Reads.STUDENT_ENTROPY in declares)
        assert (reader.batch.teacher_entropy is not None) == (Reads.TEACHER_ENTROPY in declares)


@every_source
def test_entropy_is_taken_after_temperature(source: str):
    reader = Reader((Reads.STUDENT_ENTROPY, Reads.TEACHER_ENTROPY))
    method = method_of(supports.full(), source=SOURCES[source], weight=reader.weight(), temperature=2.0)
    train(method, sampling={"max_completion_length": PADDED, "temperature": 2.0})
    batch = reader.batch
    assert_column(batch.student_entropy, batch, entropies(wrapped(2), batch, 2.0))
    assert_column(batch.teacher_entropy, batch, entropies(wrapped(1), batch, 2.0))


def test_student_entropy_is_equal_when_source_gives_none():
    """A reader of old logs writes what the student would: same tokens, same weights, one column."""
    on_policy = sources.on_policy()

    def forgetful(prompts: Any, writers: Any, seed: Any, record: Record) -> list[Rollout]:
        return [replace(r, student_entropy=None) for r in on_policy(prompts, writers, seed, record)]

    seen: list[Tensor] = []
    for source in (on_policy, forgetful):
        reader = Reader((Reads.STUDENT_ENTROPY,))
        train(
            method_of(supports.full(), source=source, weight=reader.weight()),
            sampling={"max_completion_length": PADDED, "temperature": 0.5},
        )
        assert reader.batch.student_entropy is not None
        seen.append(reader.batch.student_entropy)
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-5, equal_nan=True)
