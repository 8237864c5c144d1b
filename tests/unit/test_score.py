"""Hidden states to log-probs: against the models' own logits, plain autograd, Python sets; a trap for large tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import FAMILIES, LETTERS, build, prompts_of, step, teacher_of, tiny, write
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import opd.score
from opd import methods, models
from opd.loading import character_tokenizer
from opd.models import LanguageModel
from opd.score import Head, chunked_loss, chunks, log_probs, logp_at, teacher_scores
from opd.supports import full, sampled, support_tokens, top_k
from opd.types import Sampling, Scores, Support

V = 10  # letters, <pad> and <eos>
SETS = ("teacher", "student", "intersection", "union", "symmetric_difference")


def ids_of(lm: LanguageModel, text: str = "abcdefghhgfab") -> Tensor:
    return torch.tensor([lm.tokenizer(text).input_ids])


def own_logits(lm: LanguageModel, ids: Tensor) -> Tensor:
    return lm.causal_lm(input_ids=ids, use_cache=False).logits[..., : lm.vocabulary]


# --- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_rows", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits(family: str, padding_rows: int):
    lm = tiny(family, padding_rows=padding_rows)
    head, ids = lm.head(), ids_of(lm)
    assert head.weight.shape[0] == V + padding_rows
    assert head.vocabulary == V
    for temperature in (1.0, 0.5):
        expected = (own_logits(lm, ids).double() / temperature).log_softmax(-1)
        got = log_probs(head, lm.hidden(ids)[0], temperature)
        assert got.shape == (ids.shape[1], V)
        torch.testing.assert_close(got, expected[0].float(), atol=2e-6, rtol=2e-6)
        some = torch.tensor([[3, 0, 9]]).expand(ids.shape[1], 3)
        chosen = logp_at(head, lm.hidden(ids)[0], some, temperature)
        torch.testing.assert_close(chosen, expected[0].float().gather(-1, some), atol=2e-6, rtol=2e-6)


def test_the_families_cover_every_kind_of_head():
    heads = {family: tiny(family) for family in FAMILIES}
    tied = {
        family: lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
        for family, lm in heads.items()
    }
    assert not tied["llama"]
    assert tied["llama_tied"]
    assert tied["gemma2"]
    assert tied["gpt2"]
    assert heads["phi"].head().bias is not None
    assert heads["gemma2"].head().softcap == 3.0
    assert heads["cohere"].head().multiplier == 0.25
    assert heads["granite"].head().multiplier == 0.25


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "phi"])
def test_padding_rows_have_no_share_and_no_gradient(family: str):
    lm = tiny(family, padding_rows=4)
    with torch.no_grad():  # rows that would win every softmax, if they were tokens
        lm.head().weight[V:] = 50.0
        if lm.head().bias is not None:
            lm.head().bias[V:] = 50.0
    head, hidden = lm.head(), lm.hidden(ids_of(lm))[0]
    log_p = log_probs(head, hidden)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(log_p)))

    chunked_loss(lambda h, local, rows: log_probs(local, h)[:, 2].sum(), hidden, head).backward()
    grad = head.weight.grad
    assert grad is not None
    assert grad.shape[0] == V + 4
    assert bool((grad[V:] == 0).all())
    assert bool((grad[:V] != 0).any())
    if head.bias is not None:
        assert bool((head.bias.grad[V:] == 0).all())


def test_heads_of_different_width_compare_the_same_vocabulary():
    """A teacher with the student's weights and more padding rows, as wide heads of one family are, is the student."""
    student = tiny(padding_rows=2)
    model = build(padding_rows=9)
    with torch.no_grad():
        state = student.model.state_dict()
        for name, parameter in model.named_parameters():
            parameter[: len(state[name])] = state[name]
            parameter[len(state[name]) :] = 40.0
    teacher = models.wrap(model, student.tokenizer, name="teacher")
    prompts = prompts_of("ab", "gf")
    sampling = Sampling(max_completion_length=5)
    for name, options in (("reverse_kl", {}), ("topk_reverse_kl", {"k": V}), ("gkd", {"beta": 0.0})):
        method = methods.build(name, options)
        scorer = teacher_of(method, student, teacher)
        got = step(method, student, scorer, write(method, student, teacher, prompts, sampling))
        assert abs(got.loss) < 1e-6
        assert got.norm < 1e-5
        other = tiny(seed=1, padding_rows=9)
        rollouts = write(method, student, other, prompts, sampling)
        assert step(method, student, teacher_of(method, student, other), rollouts).norm > 0.1


# --- what a teacher says --------------------------------------------------------------------------------------------


SUPPORTS = [
    sampled(),
    full(),
    *(top_k(3, by=by, with_sampled=also) for by in SETS for also in (False, True)),  # type: ignore[arg-type]
]


def name_of(support: Support) -> str:
    return f"{support.kind}-{support.by}{'-with_sampled' * support.with_sampled}" if support.k else support.kind


@pytest.mark.parametrize("support", SUPPORTS, ids=name_of)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("entries", [1, 3 * V, 2**20])
def test_teacher_scores_are_those_of_the_full_logits(
    support: Support, temperature: float, entries: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opd.score, "CHUNK_ENTRIES", entries)
    teacher, student = tiny("phi", seed=1, padding_rows=3), tiny(seed=0)
    ids = ids_of(teacher)
    response, t = ids[0, 4:], ids.shape[1] - 4
    hidden = teacher.hidden(ids)[0, 3:-1]
    expected = (own_logits(teacher, ids)[0, 3:-1] / temperature).log_softmax(-1)
    student_top = own_logits(student, ids)[0, 3:-1].topk(3).indices
    got = teacher_scores(teacher.head(), hidden, response, support, temperature, student_top)

    assert not any(value.requires_grad for value in tensors(got))
    torch.testing.assert_close(got.teacher_logp, expected.gather(-1, response[:, None])[:, 0])
    assert (got.teacher_hidden is not None) == (support.kind == "full")
    if support.kind == "full":
        assert got.teacher_hidden is not None
        torch.testing.assert_close(log_probs(teacher.head(), got.teacher_hidden, temperature), expected)
    if support.kind != "top_k":
        assert got.support_ids is None
        assert got.teacher_support_logp is None
        return
    assert got.support_ids is not None
    assert got.support_mask is not None
    assert got.teacher_support_logp is not None
    for i in range(t):
        mine, theirs = set(student_top[i].tolist()), set(expected[i].topk(3).indices.tolist())
        wanted = combined(support, mine, theirs, int(response[i]))
        kept = got.support_mask[i]
        listed = got.support_ids[i][kept].tolist()
        assert sorted(listed) == sorted(wanted)
        torch.testing.assert_close(got.teacher_support_logp[i][kept], expected[i][listed])
    assert got.support_ids.shape == got.support_mask.shape == got.teacher_support_logp.shape


def tensors(scores: Scores) -> list[Tensor]:
    values = (
        getattr(scores, name) for name in ("teacher_logp", "support_ids", "teacher_support_logp", "teacher_hidden")
    )
    return [value for value in values if value is not None]


def combined(support: Support, student: set[int], teacher: set[int], token: int) -> set[int]:
    sets = {
        "teacher": teacher,
        "student": student,
        "intersection": student & teacher,
        "union": student | teacher,
        "symmetric_difference": student ^ teacher,
    }
    return sets[support.by] | ({token} if support.with_sampled else set())


@given(
    by=st.sampled_from(SETS),
    with_sampled=st.booleans(),
    rows=st.integers(1, 4).flatmap(
        lambda k: st.lists(
            st.tuples(
                st.permutations(range(6)).map(lambda ids: ids[:k]),
                st.permutations(range(6)).map(lambda ids: ids[:k]),
                st.integers(0, 5),
            ),
            min_size=1,
            max_size=5,
        )
    ),
)
@settings(max_examples=300, deadline=None)
def test_support_tokens_are_python_sets(by: Any, with_sampled: bool, rows: list[tuple[list[int], list[int], int]]):
    support = top_k(len(rows[0][0]), by=by, with_sampled=with_sampled)
    ids, exists = support_tokens(
        support,
        student_top=torch.tensor([row[0] for row in rows]),
        teacher_top=torch.tensor([row[1] for row in rows]),
        sampled=torch.tensor([[row[2]] for row in rows]),
    )
    assert exists.dtype is torch.bool
    assert ids.shape == exists.shape
    for i, (student, teacher, token) in enumerate(rows):
        listed = ids[i][exists[i]].tolist()
        assert sorted(listed) == sorted(combined(support, set(student), set(teacher), token))


def test_only_the_sets_that_need_the_students_tokens_ask_for_them():
    asks = {by: top_k(7, by=by).student_top_k for by in SETS}  # type: ignore[arg-type]
    assert asks == {"teacher": 0, "student": 7, "intersection": 7, "union": 7, "symmetric_difference": 7}
    assert full().student_top_k == sampled().student_top_k == 0


# --- the chunked loss -----------------------------------------------------------------------------------------------


def heads() -> dict[str, Head]:
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(V + 2, 6, generator=generator), torch.randn(V + 2, generator=generator)
    plain = Head(weight=weight, bias=None, vocabulary=V)
    return {
        "plain": plain,
        "bias": replace(plain, bias=bias),
        "everything": replace(plain, bias=bias, multiplier=0.5, softcap=2.0),
    }


def entropy(hidden: Tensor, head: Head, rows: slice) -> Tensor:
    """Something that looks at every token of the vocabulary and at which rows it got."""
    log_p = log_probs(head, hidden, 0.7)
    place = torch.arange(rows.start, rows.stop) + 1
    return -((log_p.exp() * log_p).sum(-1) * place).sum()


@pytest.mark.parametrize("kind", heads())
@pytest.mark.parametrize("entries", [1, 4 * V, 2**20])
def test_the_gradient_of_the_chunked_loss_is_autograds(kind: str, entries: int, monkeypatch: pytest.MonkeyPatch):
    n = 11

    def leaves() -> tuple[Tensor, Head]:
        head = heads()[kind]
        bias = None if head.bias is None else head.bias.clone().requires_grad_()
        hidden = torch.randn(n, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
        return hidden, replace(head, weight=head.weight.clone().requires_grad_(), bias=bias)

    hidden, head = leaves()
    expected = 3.0 * entropy(hidden, head, slice(0, n))
    expected.backward()

    monkeypatch.setattr(opd.score, "CHUNK_ENTRIES", entries)
    other_hidden, other = leaves()
    got = 3.0 * chunked_loss(entropy, other_hidden, other)
    got.backward()

    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(other_hidden.grad, hidden.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.weight.grad, head.weight.grad, atol=1e-5, rtol=1e-5)
    assert bool((other.weight.grad[V:] == 0).all())
    if kind != "plain":
        assert head.bias is not None
        assert other.bias is not None
        torch.testing.assert_close(other.bias.grad, head.bias.grad, atol=1e-5, rtol=1e-5)


def test_what_is_frozen_gets_no_gradient():
    head = heads()["bias"]
    hidden = torch.randn(5, 6).requires_grad_()
    chunked_loss(entropy, hidden, head).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None

    weight = head.weight.clone().requires_grad_()
    chunked_loss(entropy, hidden.detach(), replace(head, weight=weight)).backward()
    assert weight.grad is not None


def test_without_gradients_there_is_only_a_value():
    head = heads()["bias"]
    hidden = torch.randn(5, 6).requires_grad_()
    with torch.no_grad():
        value = chunked_loss(entropy, hidden, head)
    assert not value.requires_grad
    torch.testing.assert_close(value, entropy(hidden, head, slice(0, 5)).detach())


def test_a_loss_that_is_a_constant_has_a_gradient_of_zero():
    hidden = torch.randn(5, 6).requires_grad_()
    total = chunked_loss(lambda h, head, rows: torch.tensor(float(len(h))), hidden, heads()["plain"])
    total.backward()
    assert total.item() == 5.0
    assert hidden.grad is not None
    assert bool((hidden.grad == 0).all())


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("entries", [1, 40, 41, 79, 80, 10**6])
def test_chunks_cover_every_token_once_and_stay_below_the_limit(n: int, entries: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opd.score, "CHUNK_ENTRIES", entries)
    slices = list(chunks(n, 40))
    assert [i for rows in slices for i in range(n)[rows]] == list(range(n))
    assert all((rows.stop - rows.start) * 40 <= max(entries, 40) for rows in slices)


# --- memory ---------------------------------------------------------------------------------------------------------


class Trap(TorchDispatchMode):
    """Remembers every tensor of at least `entries` entries that an operation makes, forward and backward."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries
        self.caught: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor) and value.numel() >= self.entries:
                self.caught.append((str(func), tuple(value.shape)))
        return out


LARGE = 300


def wide() -> tuple[LanguageModel, LanguageModel]:
    letters = "".join(chr(0x4E00 + i) for i in range(LARGE - 2))
    tokenizer = character_tokenizer(LETTERS + letters[: -len(LETTERS)])
    assert len(tokenizer) == LARGE
    return tiny(tokenizer=tokenizer), tiny(tokenizer=tokenizer, seed=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opd", {}),
        ("grpo", {}),
        ("sft", {"source": "teacher"}),
        ("topk_reverse_kl", {"k": 4, "by": "union", "with_sampled": True}),
        ("topk_reverse_kl", {"k": 4, "form": "renormalised"}),
        ("reverse_kl", {}),
        ("gkd", {}),
    ],
)
@pytest.mark.parametrize("micro_batch_tokens", [40, 10**6])
def test_no_path_of_the_loss_holds_the_logits_of_all_tokens(
    name: str, options: dict[str, Any], micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    student, external = wide()
    method = methods.build(name, options)
    rollouts = write(method, student, external, prompts_of("ab", "cde"), Sampling(max_completion_length=12, n=4))
    n = sum(len(r.response_ids) for r in rollouts)
    assert n > 60
    chunk = 20 * LARGE
    monkeypatch.setattr(opd.score, "CHUNK_ENTRIES", chunk)
    assert student.head().weight.numel() < chunk < n * LARGE / 3
    teacher = teacher_of(method, student, external)
    with Trap(chunk + 1) as trap:
        got = step(method, student, teacher, rollouts, micro_batch_tokens)
    assert got.norm > 0
    assert not trap.caught

    monkeypatch.setattr(opd.score, "CHUNK_ENTRIES", 10**9)
    with Trap(n * LARGE) as trap:
        step(method, student, teacher, rollouts)
    assert trap.caught, "one chunk of all tokens is what the trap is for"


def test_the_trap_catches_plain_logits_and_their_gradient():
    student, _ = wide()
    hidden = torch.randn(80, student.head().weight.shape[1])
    with Trap(80 * LARGE) as trap:
        log_probs(student.head(), hidden).sum().backward()
    assert ("aten._log_softmax.default", (80, LARGE)) in trap.caught
    assert any("backward" in func for func, _ in trap.caught)
