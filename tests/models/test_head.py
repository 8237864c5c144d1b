"""Hidden states to log-probs: against the models' own logits, plain autograd, Python sets; a trap for large tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import FAMILIES, LETTERS, batch_of, build, prompts_of, step, teacher_of, tiny, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import opd.models.head
import opd.teachers.scoring
from opd import methods
from opd.loss.collate import attach, split
from opd.loss.fused import ChunkLoss, fused_loss
from opd.loss.token_loss import loss_of
from opd.methods import METHODS
from opd.models import wrapping
from opd.models.head import Head, chunks, paired_log_probs, tiles
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.pieces.supports import full, sampled, support_tokens, top_k
from opd.teachers.scoring import teacher_scores
from opd.types import Sampling, ScoreRequest, Scores, Support

pytestmark = pytest.mark.numeric

V = 10  # letters, <pad> and <eos>
SETS = ("teacher", "student", "intersection", "union", "symmetric_difference")


def log_probs(head: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """[n, H] -> [n, V], all at once."""
    return (head.logits(hidden) / temperature).log_softmax(-1)


def ids_of(lm: LanguageModel, text: str = "abcdefghhgfab") -> Tensor:
    return torch.tensor([lm.tokenizer(text).input_ids])


def own_logits(lm: LanguageModel, ids: Tensor) -> Tensor:
    return lm.causal_lm(input_ids=ids, use_cache=False).logits[..., : lm.vocabulary]


# --- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_rows", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_log_probs_of_model_logits(family: str, padding_rows: int):
    lm = tiny(family, padding_rows=padding_rows)
    head, ids = lm.head(), ids_of(lm)
    assert head.weight.shape[0] == V + padding_rows
    assert head.vocabulary == V
    for temperature in (1.0, 0.5):
        expected = (own_logits(lm, ids).double() / temperature).log_softmax(-1)
        got = log_probs(head, lm.hidden(ids)[0], temperature)
        assert got.shape == (ids.shape[1], V)
        torch.testing.assert_close(got, expected[0].float(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_loss_passes_model_logits_to_loss(family: str, whole: bool):
    """After multiplier, soft cap and temperature: all of them, or those of K tokens a position."""
    lm = tiny(family, padding_rows=3)
    ids = ids_of(lm)
    expected = own_logits(lm, ids)[0].detach() / 0.7
    some = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:3] for i in range(ids.shape[1])])
    seen: list[Tensor] = []

    def look(logits: Tensor, rows: slice) -> Tensor:
        seen.append(logits.clone())
        return logits.zero_().sum()

    fused_loss(look, lm.hidden(ids)[0], lm.head(), 0.7, None if whole else some)
    wanted = expected if whole else expected.gather(-1, some)
    torch.testing.assert_close(torch.cat(seen), wanted, atol=2e-6, rtol=2e-6)


def test_families_cover_every_kind_of_head():
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
def test_head_gives_padding_rows_no_share_and_no_gradient(family: str):
    lm = tiny(family, padding_rows=4)
    with torch.no_grad():  # rows that would win every softmax, if they were tokens
        lm.head().weight[V:] = 50.0
        if lm.head().bias is not None:
            lm.head().bias[V:] = 50.0
    head, hidden = lm.head(), lm.hidden(ids_of(lm))[0]
    log_p = log_probs(head, hidden)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(log_p)))

    fused_loss(by_autograd(lambda logits, rows: logits.log_softmax(-1)[:, 2].sum()), hidden, head).backward()
    grad = head.weight.grad
    assert grad is not None
    assert grad.shape[0] == V + 4
    assert bool((grad[V:] == 0).all())
    assert bool((grad[:V] != 0).any())
    if head.bias is not None:
        assert bool((head.bias.grad[V:] == 0).all())


def test_head_compares_same_vocabulary_when_widths_differ():
    """A teacher with the student's weights and more padding rows, as wide heads of one family are, is the student."""
    student = tiny(padding_rows=2)
    model = build(padding_rows=9)
    with torch.no_grad():
        state = student.model.state_dict()
        for name, parameter in model.named_parameters():
            parameter[: len(state[name])] = state[name]
            parameter[len(state[name]) :] = 40.0
    teacher = wrapping.wrap(model, student.tokenizer, name="teacher")
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
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("chunk", "tile"), [(1, 1), (3 * V, 2**20), (2**20, 2 * V), (2**20, 2**20)])
def test_teacher_scores_equal_full_logits(
    support: Support, temperature: float, spread: bool, chunk: int, tile: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", chunk)
    teacher, student = tiny("phi", seed=1, padding_rows=3), tiny(seed=0)
    ids = ids_of(teacher)
    response, t = ids[0, 4:], ids.shape[1] - 4
    hidden = teacher.hidden(ids)[0, 3:-1]
    expected = (own_logits(teacher, ids)[0, 3:-1] / temperature).log_softmax(-1)
    student_top = own_logits(student, ids)[0, 3:-1].topk(3).indices
    monkeypatch.setattr(opd.models.head, "TILE_ENTRIES", tile)
    got = teacher_scores(
        teacher.head(),
        hidden,
        response,
        ScoreRequest(support=support, temperature=temperature, entropy=spread),
        student_top,
    )

    assert (got.teacher_entropy is not None) == spread
    if got.teacher_entropy is not None:
        torch.testing.assert_close(got.teacher_entropy, -(expected.exp() * expected).sum(-1))
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
def test_support_tokens_equal_python_sets(by: Any, with_sampled: bool, rows: list[tuple[list[int], list[int], int]]):
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


def test_student_top_k_is_k_only_when_set_needs_student():
    asks = {by: top_k(7, by=by).student_top_k for by in SETS}  # type: ignore[arg-type]
    assert asks == {"teacher": 0, "student": 7, "intersection": 7, "union": 7, "symmetric_difference": 7}
    assert full().student_top_k == sampled().student_top_k == 0


# --- the fused loss -------------------------------------------------------------------------------------------------

N = 11


def by_autograd(loss: Callable[[Tensor, slice], Tensor]) -> ChunkLoss:
    """A loss of logits [n, C] of given rows, tile by tile, as `fused_loss` wants it: value, and gradient in place."""

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        total = torch.zeros(())
        for tile in tiles(logits):
            at = slice(rows.start + tile.start, rows.start + tile.stop)
            with torch.enable_grad():
                leaf = logits[tile].clone().requires_grad_()
                value = loss(leaf, at)
            total += value.detach()
            logits[tile] = torch.autograd.grad(value, leaf)[0]
        return total

    return chunk_loss


def heads() -> dict[str, Head]:
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(V + 2, 6, generator=generator), torch.randn(V + 2, generator=generator)
    plain = Head(weight=weight, bias=None, vocabulary=V)
    return {
        "plain": plain,
        "bias": replace(plain, bias=bias),
        "multiplier": replace(plain, multiplier=1.5),
        "everything": replace(plain, bias=bias, multiplier=0.5, softcap=2.0),
    }


def leaves(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Head]:
    """Hidden states and a head that all train."""
    head = heads()[kind]
    bias = None if head.bias is None else head.bias.to(dtype, copy=True).requires_grad_()
    hidden = (0.5 * torch.randn(N, 6, generator=torch.Generator().manual_seed(4))).to(dtype).requires_grad_()
    return hidden, replace(head, weight=head.weight.to(dtype, copy=True).requires_grad_(), bias=bias)


def plain_logits(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """Without the library, in the inputs' own type."""
    logits = hidden @ head.weight[:V].t()
    logits = (logits if head.bias is None else logits + head.bias[:V]) * head.multiplier
    return (logits if head.softcap is None else (logits / head.softcap).tanh() * head.softcap) / temperature


def entropy(logits: Tensor, rows: slice) -> Tensor:
    """Something that looks at every logit of a position and at which rows it got."""
    log_p = logits.log_softmax(-1)
    place = torch.arange(rows.start, rows.stop) + 1
    return -((log_p.exp() * log_p).sum(-1) * place).sum()


def some_ids() -> Tensor:
    """Four tokens a position, some of them twice at the same position."""
    return torch.randint(0, V, (N, 4), generator=torch.Generator().manual_seed(5))


def assert_same_gradients(mine: tuple[Tensor, Head], theirs: tuple[Tensor, Head]) -> None:
    pairs = [(mine[0], theirs[0]), (mine[1].weight, theirs[1].weight), (mine[1].bias, theirs[1].bias)]
    for got, expected in pairs:
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            assert got.grad is not None
            assert expected.grad is not None
            largest = float(expected.grad.abs().max())
            torch.testing.assert_close(got.grad.double(), expected.grad.double(), atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "rows"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("kind", heads())
@pytest.mark.parametrize(("chunk", "tile"), [(1, 1), (4 * V, 1), (4 * V, 3 * V), (2**20, 3 * V), (2**20, 2**20)])
def test_fused_loss_gradient_equals_autograd(
    kind: str, temperature: float, whole: bool, chunk: int, tile: int, monkeypatch: pytest.MonkeyPatch
):
    ids = None if whole else some_ids()
    hidden, head = leaves(kind, torch.float64)
    logits = plain_logits(hidden, head, temperature)
    expected = 3.0 * entropy(logits if ids is None else logits.gather(-1, ids), slice(0, N))
    expected.backward()

    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", chunk)
    monkeypatch.setattr(opd.models.head, "TILE_ENTRIES", tile)
    other_hidden, other = leaves(kind)
    got = 3.0 * fused_loss(by_autograd(entropy), other_hidden, other, temperature, ids)
    got.backward()

    # A float32 sum: 1.5e-7 off, two roundings, where vectors have four lanes. (The default for float64 is 1e-7.)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    assert_same_gradients((other_hidden, other), (hidden, head))
    assert other.weight.grad is not None
    assert bool((other.weight.grad[V:] == 0).all())
    if other.bias is not None:
        assert other.bias.grad is not None
        assert bool((other.bias.grad[V:] == 0).all())


def test_fused_loss_gradient_flows_to_inputs_and_accumulates():
    """A factor behind the loss, a layer before it, a second loss beside it: as with any other operation."""
    inputs, layer = torch.randn(N, 3), torch.randn(3, 6).requires_grad_()
    _, head = leaves("bias")
    (entropy(head.logits(inputs @ layer), slice(0, N)) * 0.5 + head.weight.sum() + layer.square().sum()).backward()
    other_layer = layer.detach().clone().requires_grad_()
    _, other = leaves("bias")
    fused = fused_loss(by_autograd(entropy), inputs @ other_layer, other)
    (fused * 0.5 + other.weight.sum() + other_layer.square().sum()).backward()
    assert_same_gradients((other_layer, other), (layer, head))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "rows"])
def test_fused_loss_gives_frozen_tensors_no_gradient(whole: bool):
    head, ids = heads()["bias"], None if whole else some_ids()
    hidden = torch.randn(N, 6).requires_grad_()
    fused_loss(by_autograd(entropy), hidden, head, 1.0, ids).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    assert head.bias is not None
    assert head.bias.grad is None

    weight = head.weight.clone().requires_grad_()
    fused_loss(by_autograd(entropy), hidden.detach(), replace(head, weight=weight), 1.0, ids).backward()
    assert weight.grad is not None
    assert head.bias.grad is None

    bias = head.bias.clone().requires_grad_()
    fused_loss(by_autograd(entropy), hidden.detach(), replace(head, bias=bias), 1.0, ids).backward()
    assert bias.grad is not None
    assert head.weight.grad is None


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "rows"])
def test_fused_loss_gives_value_alone_when_no_grad(whole: bool):
    hidden, head = leaves("bias")
    ids = None if whole else some_ids()
    with torch.no_grad():
        value = fused_loss(by_autograd(entropy), hidden, head, 1.0, ids)
        logits = head.logits(hidden)
    assert not value.requires_grad
    torch.testing.assert_close(value, entropy(logits if ids is None else logits.gather(-1, ids), slice(0, N)))
    frozen = fused_loss(by_autograd(entropy), hidden.detach(), heads()["bias"], 1.0, ids)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, value)


@pytest.mark.parametrize("n", [0, 1, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loss_overwrites_new_memory(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """The first chunk writes the gradient of the output layer. What lay in its memory, NaN too, is not read."""
    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", 4 * V)
    (hidden, head), (other_hidden, other) = leaves("bias", dtype), leaves("bias", dtype)
    fused_loss(by_autograd(entropy), hidden[:n], head).backward()
    monkeypatch.setattr(torch, "empty_like", lambda *given, **named: torch.full_like(given[0], torch.nan, **named))
    fused_loss(by_autograd(entropy), other_hidden[:n], other).backward()
    for mine, expected in ((other.weight.grad, head.weight.grad), (other_hidden.grad, hidden.grad)):
        assert mine is not None
        assert expected is not None
        assert torch.equal(mine, expected)
        assert bool(mine.isfinite().all())


def test_fused_loss_hands_gradient_over_when_not_scaled():
    """The gradient of a step's output layer is not copied, nor multiplied by 1, on its way to the weight."""
    made: list[str] = []
    hidden, head = leaves("plain")

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == head.weight.shape:
                made.append(str(func))
            return out

    loss = fused_loss(by_autograd(entropy), hidden, head)
    with Made():
        loss.backward()
    assert made == ["aten.detach.default"], "a view; a product or a copy would be another operation"


@pytest.mark.parametrize("kind", heads())
def test_fused_loss_gradient_is_zero_when_loss_is_constant(kind: str):
    hidden, head = leaves(kind)

    def constant(logits: Tensor, rows: slice) -> Tensor:
        logits.zero_()
        return torch.tensor(float(len(logits)))

    total = fused_loss(constant, hidden, head)
    total.backward()
    assert total.item() == float(N)
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert bool((hidden.grad == 0).all())
    assert bool((head.weight.grad == 0).all())


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("entries", [1, 40, 41, 79, 80, 10**6])
def test_chunks_cover_tokens_once_within_limit(n: int, entries: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", entries)
    slices = list(chunks(n, 40, torch.device("cpu")))
    assert [i for rows in slices for i in range(n)[rows]] == list(range(n))
    assert all((rows.stop - rows.start) * 40 <= max(entries, 40) for rows in slices)


@pytest.mark.parametrize("n", [1, 7, 100])
@pytest.mark.parametrize("entries", [1, 40, 79, 80, 10**6])
def test_tiles_cover_rows_once_within_limit(n: int, entries: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opd.models.head, "TILE_ENTRIES", entries)
    slices = list(tiles(torch.zeros(n, 40)))
    assert [i for rows in slices for i in range(n)[rows]] == list(range(n))
    assert all((rows.stop - rows.start) * 40 <= max(entries, 40) for rows in slices)
    assert list(tiles(torch.zeros(n, 40, device="meta"))) == [slice(0, n)], "only a CPU's cache is small"


@pytest.mark.parametrize(("chunk", "tile"), [(1, 1), (4 * V, 2 * V), (2**20, 3 * V), (2**20, 2**20)])
def test_paired_log_probs_equal_those_of_both_heads(chunk: int, tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", chunk)
    monkeypatch.setattr(opd.models.head, "TILE_ENTRIES", tile)
    (hidden, ours), theirs = leaves("everything"), heads()["multiplier"]
    other = torch.randn(N, 6)
    pairs = list(paired_log_probs(ours, hidden, theirs, other, 0.7))
    assert not any(part.requires_grad for pair in pairs for part in pair)
    torch.testing.assert_close(torch.cat([pair[0] for pair in pairs]), log_probs(ours, hidden, 0.7).detach())
    torch.testing.assert_close(torch.cat([pair[1] for pair in pairs]), log_probs(theirs, other, 0.7))


# --- memory ---------------------------------------------------------------------------------------------------------


class Trap(TorchDispatchMode):
    """Remembers every tensor that an operation makes, forward or backward, of a shape that is not wanted."""

    def __init__(self, unwanted: Callable[[torch.Size], bool]) -> None:
        super().__init__()
        self.unwanted = unwanted
        self.caught: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor) and self.unwanted(value.shape):
                self.caught.append((str(func), tuple(value.shape)))
        return out


def at_least(entries: int) -> Trap:
    return Trap(lambda shape: shape.numel() >= entries)


def as_long_as_the_vocabulary(head: Head) -> Trap:
    """Any tensor with a dimension of V or of the head's rows, but the head's own and its gradient."""
    rows, own = head.weight.shape[0], (head.weight.shape, torch.Size([head.weight.shape[0]]))
    return Trap(lambda shape: (head.vocabulary in shape or rows in shape) and shape not in own)


LARGE = 300


def wide(family: str = "llama", **settings: Any) -> tuple[LanguageModel, LanguageModel]:
    letters = "".join(chr(0x4E00 + i) for i in range(LARGE - 2))
    tokenizer = character_tokenizer(LETTERS + letters[: -len(LETTERS)])
    assert len(tokenizer) == LARGE
    return tiny(family, tokenizer, **settings), tiny(tokenizer=tokenizer, seed=1)


# Methods and forms that read K rows of the output layer and no vocabulary.
RENORMALISED = {("topk_reverse_kl", None), ("rethinking_opd", None), ("local_support_matching", None)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opd", {}),
        ("vopd", {"k": 4}),
        ("iw_opd", {}),
        ("sod", {}),
        ("tcod", {}),
        ("top_d", {}),
        ("mopd", {}),
        ("eff_opd", {}),
        ("extrapolated_opd", {}),
        ("grpo", {}),
        ("sft", {"source": "teacher"}),
        ("topk_reverse_kl", {"k": 4, "by": "union", "form": "tail", "with_sampled": True}),
        ("topk_reverse_kl", {"k": 4, "by": "teacher"}),
        ("topk_forward_kl", {"k": 4}),
        ("opsd", {"template": "{privileged_context}{prompt}"}),
        ("opsd", {"template": "{privileged_context}{prompt}", "beta": 0.0, "clip": 0.05}),
        ("sdft", {"template": "{privileged_context}{prompt}"}),
        ("sdpo", {"k": 4, "template": "{privileged_context}{prompt}", "otherwise": "privileged_context"}),
        ("rethinking_opd", {"k": 4}),
        ("rethinking_opd", {"k": 4, "form": "released"}),
        ("local_support_matching", {"k": 4}),
        ("context_distillation", {"template": "{privileged_context}{prompt}", "k": None}),
        ("reverse_kl", {}),
        ("gkd", {}),
        ("prune_opd", {"k": 4}),
        ("anti_sd", {"template": "{privileged_context}{prompt}"}),
        ("ropd", {}),
        ("simct", {}),
        ("uld", {}),
        ("mad_opd", {"rounds": 0}),
        ("forward_kl", {}),
        ("copd", {}),
        ("uni_opd", {}),
        ("visd", {"k": 4, "template": "{privileged_context}{prompt}"}),
        ("brts", {"k": 4, "n": 2, "hint": "{answer}h{prompt}", "marker": "h"}),
    ],
)
@pytest.mark.parametrize("micro_batch_tokens", [40, 10**6])
def test_loss_holds_no_logits_of_all_tokens(
    name: str, options: dict[str, Any], micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    student, external = wide()
    method = methods.build(name, options)
    prompts = prompts_of("ab", "cde", privileged_context="fg", response="abcdefghab", answer="b")
    samples = 8 if name == "copd" else 4  # half of its rows are the peer's
    rollouts = write(method, student, external, prompts, Sampling(max_completion_length=12, n=samples))
    n = max(sum(len(r.response_ids) for r in rollouts if r.part == part) for part in {r.part for r in rollouts})
    assert n > 60
    chunk = 20 * LARGE
    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", chunk)
    monkeypatch.setattr(opd.teachers.scoring, "CHUNKS_AT_ONCE", 1)
    assert student.head().weight.numel() < chunk < n * LARGE / 3
    teacher = teacher_of(method, student, external)
    with at_least(chunk + 1) as trap:
        got = step(method, student, teacher, rollouts, micro_batch_tokens)
    assert got.norm > 0
    assert not trap.caught

    monkeypatch.setattr(opd.models.head, "CHUNK_ENTRIES", 10**9)
    with at_least(n * LARGE) as trap:
        step(method, student, teacher, rollouts)
    reads_all_logits = (name, options.get("form")) not in RENORMALISED
    assert bool(trap.caught) == reads_all_logits, "one chunk of all tokens is what the trap is for"


def test_methods_all_have_case_of_loss_memory():
    (mark,) = [
        mark
        for mark in test_loss_holds_no_logits_of_all_tokens.pytestmark  # type: ignore[attr-defined]
        if mark.args[0] == ("name", "options")
    ]
    # gui_sd needs an image; its loss is that of reverse_kl
    assert {name for name, _ in mark.args[1]} == set(METHODS) - {"gui_sd"}


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("form", ["renormalised", "tail"])
@pytest.mark.parametrize("by", ["teacher", "union"])
def test_topk_reverse_kl_reads_k_head_rows_when_renormalised(family: str, form: str, by: str):
    student, external = wide(family, padding_rows=3)
    method = methods.build("topk_reverse_kl", {"k": 4, "form": form, "by": by, "with_sampled": True})
    rollouts = write(method, student, external, prompts_of("ab", "cde"), Sampling(max_completion_length=6, n=2))
    batch = attach(batch_of(method, student, teacher_of(method, student, external), rollouts), method)
    denominator = method.normalise(batch)
    with as_long_as_the_vocabulary(student.head()) as trap:
        for micro in split(student, batch, denominator, 10**6):
            loss_of(method, student, micro, denominator.count)[0].backward()
    assert float(student.head().weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert bool(trap.caught) == (form != "renormalised"), trap.caught


@pytest.mark.parametrize("sampled_too", [False, True])
def test_score_skips_teacher_head_when_sampled_is_false(sampled_too: bool):
    student, external = wide()
    method = methods.build("reverse_kl", {})
    rollouts = write(method, student, external, prompts_of("ab", "cde"), Sampling(max_completion_length=6, n=2))
    teacher = teacher_of(method, student, external)
    assert teacher is not None
    with as_long_as_the_vocabulary(teacher.head()) as trap:
        scores = teacher.score(
            rollouts, [r.prompt for r in rollouts], ScoreRequest(support=full(), temperature=1.0, sampled=sampled_too)
        )
    assert bool(trap.caught) == sampled_too
    for rollout, score in zip(rollouts, scores, strict=True):
        assert score.teacher_logp.shape == rollout.response_ids.shape
        assert bool(score.teacher_logp.isnan().all()) == (not sampled_too)
        assert score.teacher_hidden is not None
        assert score.teacher_entropy is None


def test_trap_catches_logits_and_their_gradient():
    student, _ = wide()
    hidden = torch.randn(80, student.head().weight.shape[1])
    with at_least(80 * LARGE) as trap:
        log_probs(student.head(), hidden).sum().backward()
    assert ("aten._log_softmax.default", (80, LARGE)) in trap.caught
    assert any("backward" in func for func, _ in trap.caught)
    with as_long_as_the_vocabulary(student.head()) as trap:
        log_probs(student.head(), hidden[:1]).sum().backward()
    assert ("aten._log_softmax.default", (1, LARGE)) in trap.caught


def test_trap_sees_inside_fused_loss():
    hidden, head = leaves("plain")
    with at_least(N * V) as trap:
        fused_loss(by_autograd(entropy), hidden, head)
    assert ("aten._log_softmax.default", (N, V)) in trap.caught
