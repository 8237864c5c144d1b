"""Drawing tokens, the decode loop, teachers and models: against exact distributions and the models' own forward."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import (
    FAMILIES,
    LETTERS,
    Gradient,
    byte_tokenizer,
    chain,
    double,
    full_logits,
    parameters_of,
    policy,
    prompts_of,
    rollout_of,
    same,
    sampler,
    step,
    teacher_of,
    tiny,
    write,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import opd
from opd import methods
from opd.errors import AlignmentError, ConfigError, DataError, OPDError
from opd.models import adapters, forward, saving, wrapping
from opd.models.forward import shared_prefixes
from opd.models.language_model import LanguageModel, frozen_copy
from opd.models.new import character_tokenizer
from opd.models.vocabularies import check_same_tokens
from opd.pieces.supports import full, sampled, top_k
from opd.pieces.teacher_rules import external, self_ema, self_frozen, self_live
from opd.recipe.schema import OptimizerSection
from opd.samplers import hf
from opd.samplers.draw import draw
from opd.samplers.writers import TeacherWriter
from opd.stage import optimisers
from opd.teachers.local import LocalTeacher, local_teacher
from opd.types import Prompt, Record, Rollout, Sampling, ScoreRequest, Scores, TeacherRule

LORA: dict[str, Any] = {"rank": 2, "alpha": 4.0, "target_modules": "all-linear"}

# --- drawing --------------------------------------------------------------------------------------------------------


def exact(logits: Sequence[float], temperature: float, keep_k: int, top_p: float) -> list[float]:
    """Temperature, then the k most likely, renormalised, then the smallest set of them with mass >= top_p."""
    largest = max(logits)
    weights = [math.exp((z - largest) / temperature) for z in logits]
    order = sorted(range(len(logits)), key=lambda v: -weights[v])[: keep_k or len(logits)]
    total = math.fsum(weights[v] for v in order)
    before = [0.0, *itertools.accumulate(weights[v] for v in order)]
    nucleus = {v for v, mass in zip(order, before, strict=False) if top_p == 1.0 or mass < top_p * total}
    kept = math.fsum(weights[v] for v in nucleus)
    return [weights[v] / kept if v in nucleus else 0.0 for v in range(len(logits))]


def on_a_grid(logits: Tensor, n: int = 20_000, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Draws at n evenly spread uniform numbers: frequencies are the distribution, up to 1/n a token."""
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return drawn(logits.expand(n, -1), uniforms, **settings)


def drawn(logits: Tensor, uniforms: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    got = draw(logits, uniforms, **settings)
    return got.ids, got.sampler_logp, got.policy_logp


LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, -30.0, 1.5, 1.1, -0.4, 0.7, -2.2])
FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 2.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 3, "top_p": 0.999},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_draw_equals_exact_truncated_distribution(settings: dict[str, Any]):
    n = 20_000
    ids, sampler_logp, policy_logp = on_a_grid(LOGITS, n, **settings)
    logits = LOGITS.tolist()
    expected = exact(logits, settings["temperature"], settings.get("top_k", 0), settings.get("top_p", 1.0))
    counts = torch.bincount(ids, minlength=len(logits))
    for token, probability in enumerate(expected):
        assert abs(counts[token].item() / n - probability) <= 2 / n
        if probability == 0.0:
            assert counts[token] == 0
    untruncated = exact(logits, settings["temperature"], 0, 1.0)
    torch.testing.assert_close(sampler_logp.exp(), torch.tensor(expected)[ids], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(policy_logp.exp(), torch.tensor(untruncated)[ids], atol=1e-6, rtol=1e-5)
    truncated = sum(p > 0 for p in expected) < len(expected)
    assert bool((sampler_logp > policy_logp).all() if truncated else torch.equal(sampler_logp, policy_logp))


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 200}, {"top_k": 700, "top_p": 0.5}])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_draw_finds_large_sets_exactly(settings: dict[str, Any], spread: float):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float() * spread
    expected = exact(logits.tolist(), 1.0, settings.get("top_k", 0), settings.get("top_p", 1.0))
    n = 5_000
    ids, sampler_logp, _ = on_a_grid(logits, n, temperature=1.0, **settings)
    frequency = torch.bincount(ids, minlength=1000).double() / n
    wanted = torch.tensor(expected, dtype=torch.float64)
    # The last token of a nucleus may fall on either side of top_p by rounding; its mass is 1/1000 at most here.
    assert int(((wanted > 0) != (frequency > 2 / n)).logical_and(wanted > 4 / n).sum()) <= 1
    assert float((frequency - wanted).abs().max()) <= 2 / n + float(wanted[wanted > 0].min())
    torch.testing.assert_close(sampler_logp.double().exp(), wanted[ids], atol=2e-6, rtol=2e-3)


def test_draw_is_argmax_when_temperature_is_zero():
    ids, sampler_logp, policy_logp = on_a_grid(LOGITS, 100, temperature=0.0)
    assert set(ids.tolist()) == {int(LOGITS.argmax())}
    assert bool((sampler_logp == 0).all())
    torch.testing.assert_close(policy_logp, LOGITS.log_softmax(-1).max().expand(100))


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 3}, {"top_k": 5, "top_p": 0.5}])
@pytest.mark.parametrize(
    "logits", [[0.0, 1.0, -1.0, 0.5], [5.0, -torch.inf, 0.0, -torch.inf], [-200.0, 0.0, -300.0, 9.0]]
)
def test_draw_gives_tokens_with_mass_at_ends_of_interval(settings: dict[str, Any], logits: list[float]):
    below_one = np.nextafter(1.0, 0.0)
    uniforms = torch.tensor([0.0, 5e-324, 1e-17, below_one, 1 - 1e-16, 1 - 1e-12], dtype=torch.float64)
    rows = torch.tensor(logits).expand(len(uniforms), -1)
    ids, sampler_logp, policy_logp = drawn(rows, uniforms, temperature=1.0, **settings)
    expected = exact(logits, 1.0, settings.get("top_k", 0), settings.get("top_p", 1.0))
    assert all(expected[token] > 0 for token in ids.tolist())
    assert bool(sampler_logp.isfinite().all())
    assert bool(policy_logp.isfinite().all())


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 3}])
@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(1.0, 0.0)), 1.0])
def test_draw_gives_no_massless_token_when_rounding(settings: dict[str, Any], uniform: float):
    """500 rows whose sums are 1 up to rounding, and whose first and last token have no mass; u = 1 is the limit."""
    logits = torch.randn(500, 9, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 8]] = -torch.inf
    ids, sampler_logp, _ = drawn(logits, torch.full((500,), uniform, dtype=torch.float64), temperature=1.0, **settings)
    assert bool(((ids > 0) & (ids < 8)).all())
    assert bool(sampler_logp.isfinite().all())


def test_draw_is_equal_row_by_row():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 300, generator=generator) * torch.linspace(0.01, 8, 40)[:, None]
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    settings = {"temperature": 0.8, "top_p": 0.9}
    together = drawn(logits, uniforms, **settings)
    alone = [drawn(logits[i : i + 1], uniforms[i : i + 1], **settings) for i in range(40)]
    for column, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(column, torch.cat(parts))


# --- the decode loop ------------------------------------------------------------------------------------------------

PROMPTS = prompts_of("a", "bcdefgh", "hg", "abab")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 3}, {"temperature": 0.0}])
def test_sampler_records_log_probs_and_top_ids_of_forward(family: str, sampling: dict[str, Any]):
    lm = tiny(family, padding_rows=3)
    write_ = sampler(lm, n=2, **sampling)
    for rollout in write_(PROMPTS, seed=(0, 3), record=Record(top_k=4)):
        log_p = policy(lm, rollout)
        got = rollout.policy_logp
        assert got is not None
        assert rollout.sampler_logp is not None
        assert rollout.student_top_ids is not None
        torch.testing.assert_close(
            got.double(), log_p.gather(-1, rollout.response_ids[:, None])[:, 0], atol=1e-4, rtol=0
        )
        mass = [exact(row.tolist(), 1.0, sampling.get("top_k", 0), sampling.get("top_p", 1.0)) for row in log_p]
        drawn = torch.tensor([row[token] for row, token in zip(mass, rollout.response_ids.tolist(), strict=True)])
        if sampling.get("temperature") == 0.0:
            assert rollout.response_ids.tolist() == log_p.argmax(-1).tolist()
            drawn = torch.ones(len(drawn))
        torch.testing.assert_close(rollout.sampler_logp.exp(), drawn, atol=1e-4, rtol=0)
        top = log_p.gather(-1, rollout.student_top_ids)
        torch.testing.assert_close(top, log_p.topk(4).values, atol=1e-4, rtol=0)
        assert all(len(set(row)) == 4 for row in rollout.student_top_ids.tolist())
        assert rollout.sampling == write_.sampling


def test_sampler_depends_on_seed_step_and_prompt_alone(monkeypatch: pytest.MonkeyPatch):
    lm = tiny()
    together = {(r.prompt.id, r.sample): r for r in sampler(lm, n=3)(PROMPTS, seed=(1, 2))}
    turned = sampler(lm, n=3)(PROMPTS[::-1], seed=(1, 2))
    assert [r.prompt.id for r in turned] == [p.id for p in PROMPTS[::-1] for _ in range(3)]
    assert [r.sample for r in turned] == [0, 1, 2] * 4
    assert all(same(together[r.prompt.id, r.sample], r) for r in turned)
    for prompt in PROMPTS:
        assert all(same(together[r.prompt.id, r.sample], r) for r in sampler(lm, n=2)([prompt], seed=(1, 2)))
    monkeypatch.setattr(hf, "ROWS", 5)
    assert all(same(together[r.prompt.id, r.sample], r) for r in sampler(lm, n=3)(PROMPTS, seed=(1, 2)))


def test_sampler_varies_with_seed_step_prompt_and_sample():
    lm = tiny(tokenizer=byte_tokenizer(), spread=0.1)
    seen: set[tuple[int, ...]] = set()
    for seed, key in [((0, 0), 0), ((1, 0), 0), ((0, 1), 0), ((0, 0), 1)]:
        seen |= {tuple(r.response_ids.tolist()) for r in sampler(lm, n=3)([Prompt(id=key, content="a")], seed=seed)}
    assert len(seen) == 12
    again = sampler(lm, n=3)([Prompt(id=0, content="a")], seed=(0, 0))
    assert {tuple(r.response_ids.tolist()) for r in again} < seen


def test_sampler_draws_equally_when_recording_or_limited():
    lm = tiny(spread=0.1)
    plain = sampler(lm)(PROMPTS, seed=(0, 0))
    assert all(
        same(a, b) for a, b in zip(plain, sampler(lm)(PROMPTS, seed=(0, 0), record=Record(top_k=2)), strict=True)
    )
    assert plain[0].student_top_ids is None
    cut = sampler(lm, max_completion_length=4)(PROMPTS, seed=(0, 0))
    assert all(b.response_ids.tolist() == a.response_ids[:4].tolist() for a, b in zip(plain, cut, strict=True))


def test_sampler_ends_at_stop_token_or_limit():
    lm = chain("abcdef")
    (whole,) = sampler(lm)(prompts_of("a"), seed=(0, 0))
    assert whole.text == "bcdef"
    assert whole.finished
    assert whole.response_ids.tolist()[-1] == lm.tokenizer.eos_token_id
    (cut,) = sampler(lm, max_completion_length=5)(prompts_of("a"), seed=(0, 0))
    assert cut.text == "bcdef"
    assert not cut.finished
    assert len(cut.response_ids) == 5
    (last,) = sampler(lm, max_completion_length=6)(prompts_of("a"), seed=(0, 0))
    assert last.finished


def test_stop_ids_each_end_response():
    lm = chain("abcdef")
    stop = lm.tokenizer("d", add_special_tokens=False).input_ids
    assert [r.text for r in sampler(replace(lm, stop_ids=lm.stop_ids | set(stop)))(prompts_of("a"), seed=(0, 0))] == [
        "bcd"
    ]
    lm.model.generation_config.eos_token_id = [1, *stop]
    again = wrapping.wrap(lm.model, lm.tokenizer)
    assert again.stop_ids == {1, *stop}


@pytest.mark.parametrize(
    ("text", "stop", "expected", "finished"),
    [
        ("abcdefg", ("cd",), "bcd", True),
        ("abcdefg", ("zz", "ef"), "bcdef", True),
        ("abcdefg", ("ab",), "bcdefg", True),  # the a stands in the prompt
        ("aB é!xyz", ("é",), "B é", True),
        ("ab→cdé!", ("→c", "!"), "b→c", True),
        ("abcdefgh", ("efgh",), "bcdefgh", True),
    ],
)
def test_stop_strings_end_response_at_first_match(text: str, stop: tuple[str, ...], expected: str, finished: bool):
    lm = chain(text, byte_tokenizer())
    (rollout,) = sampler(lm, stop=stop, max_completion_length=20)(prompts_of("a"), seed=(0, 0))
    assert rollout.text == expected
    assert rollout.finished is finished


@pytest.mark.parametrize(
    ("prefix", "stop", "expected"),
    [("bcd", "cd", "bcdefgh"), ("bcd", "de", "bcde"), ("bc", "e", "bcde")],
    ids=["in the prefix", "completed after it", "after it"],
)
def test_stop_string_ends_response_only_by_new_text_when_prefix_is_given(prefix: str, stop: str, expected: str):
    lm = chain("abcdefgh")
    given = lm.tokenizer(prefix).input_ids
    (rollout,) = sampler(lm, stop=(stop,), max_completion_length=20)(prompts_of("a"), seed=(0, 0), prefixes=[given])
    assert rollout.text == expected


def test_sampler_keeps_rows_when_one_finishes():
    lm = chain("abcdefgh")
    texts = {r.prompt.content: r.text for r in sampler(lm)(prompts_of(*"hgafcb"), seed=(0, 0))}
    assert texts == {"h": "", "g": "h", "a": "bcdefgh", "f": "gh", "c": "defgh", "b": "cdefgh"}


def test_sampler_never_draws_padding_rows():
    lm = tiny(padding_rows=6)
    with torch.no_grad():
        lm.head().weight[lm.vocabulary :] = lm.head().weight[: lm.vocabulary].mean(0) * 50
    rollouts = sampler(lm, n=20, max_completion_length=20)(PROMPTS, seed=(0, 0), record=Record(top_k=lm.vocabulary))
    ids = torch.cat([r.response_ids for r in rollouts])
    assert len(ids) > 300
    assert int(ids.max()) < lm.vocabulary
    assert all(int(r.student_top_ids.max()) < lm.vocabulary for r in rollouts if r.student_top_ids is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_equals_generate_when_greedy(family: str):
    lm = tiny(family, seed=2)
    rollouts = sampler(lm, temperature=0.0, max_completion_length=16)(PROMPTS, seed=(0, 0))
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids])
        out = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0, eos_token_id=1
        )
        assert rollout.response_ids.tolist() == out[0, ids.shape[1] :].tolist()


def test_sampler_leaves_model_unchanged():
    lm = tiny()
    lm.model.train()
    before = parameters_of(lm)
    rollouts = sampler(lm)(PROMPTS, seed=(0, 0))
    assert lm.model.training
    assert all(torch.equal(p, before[name]) for name, p in parameters_of(lm).items())
    assert not any(t.requires_grad for r in rollouts for t in (r.policy_logp, r.sampler_logp) if t is not None)


def test_sampler_renders_chat_with_template():
    lm = tiny(tokenizer=byte_tokenizer())
    prompt = Prompt(id=0, content=({"role": "user", "content": "hé"},))
    (rollout,) = sampler(lm)([prompt], seed=(0, 0))
    assert lm.tokenizer.decode(rollout.prompt_ids) == "<user>hé<assistant>"


def test_teacher_writer_gives_rollouts_of_student():
    """The teacher reads its context, the student the prompt; nobody's log-probs are claimed to be the student's."""
    student, teacher = tiny(seed=0), chain("abcdef")
    writer = TeacherWriter(
        teacher=teacher,
        student=student,
        sampling=Sampling(max_completion_length=8, n=2),
        context=lambda rollouts: [replace(r.prompt, content="b") for r in rollouts],
    )
    rollouts = writer(prompts_of("h", "ga"), seed=(0, 0))
    assert [r.text for r in rollouts] == ["cdef"] * 4
    assert [r.prompt.content for r in rollouts] == ["h", "h", "ga", "ga"]
    assert [list(r.prompt_ids) for r in rollouts] == [student.tokenizer(x).input_ids for x in ("h", "h", "ga", "ga")]
    assert all(r.sampler_logp is r.policy_logp is r.student_top_ids is None for r in rollouts)


def test_sampler_refuses_response_beyond_positions():
    """Learned positions end: the user is told so, and not by an index error of the embedding."""
    lm = tiny("gpt2", max_position_embeddings=8)
    with pytest.raises(OPDError, match="8"):
        sampler(lm, n=4, max_completion_length=20)(prompts_of("abc"), seed=(0, 0))


RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "num_experts": 0,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


@pytest.mark.parametrize("model_type", RECURRENT)
def test_sampler_decodes_or_refuses_recurrent_models(model_type: str):
    common = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    try:
        lm = of_type(model_type, hidden_size=16, num_hidden_layers=2, **common, **RECURRENT[model_type])
    except ConfigError:
        return
    for rollout in sampler(lm, n=2)(PROMPTS, seed=(0, 0)):
        expected = policy(lm, rollout).gather(-1, rollout.response_ids[:, None])[:, 0]
        assert rollout.policy_logp is not None
        torch.testing.assert_close(rollout.policy_logp.double(), expected, atol=1e-4, rtol=0)
    student = tiny()
    rollouts = written(student, "a", "bcdefghab", "hg")
    contexts = [replace(r.prompt, content=LETTERS * 3 + str(r.prompt.content)) for r in rollouts]
    scorer = teacher(external(), student, lm)
    together = scorer.score(rollouts, contexts, ScoreRequest(support=sampled(), temperature=1.0))
    alone = [
        scorer.score([r], [c], ScoreRequest(support=sampled(), temperature=1.0))[0]
        for r, c in zip(rollouts, contexts, strict=True)
    ]
    assert_same_scores(together, alone)


def of_type(model_type: str, **settings: Any) -> LanguageModel:
    """A model of any transformers type, all of its matrices large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = character_tokenizer(LETTERS)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **ids, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    return wrapping.wrap(model, tokenizer, name=model_type)


# --- teachers -------------------------------------------------------------------------------------------------------

SUPPORTS = [sampled(), top_k(3, by="union"), full()]
COLUMNS = ("teacher_logp", "support_ids", "support_mask", "teacher_support_logp", "teacher_hidden")


def written(lm: LanguageModel, *texts: str, seed: int = 0) -> list[Rollout]:
    return sampler(lm, max_completion_length=7, n=2)(prompts_of(*texts), seed=(seed, 0), record=Record(top_k=3))


def assert_same_scores(got: Sequence[Scores], expected: Sequence[Scores], atol: float = 1e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        for name in COLUMNS:
            mine, theirs = getattr(a, name), getattr(b, name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-5)


def scores_of(teacher: LocalTeacher | None, rollouts: list[Rollout], support: Any = None) -> list[Scores]:
    assert teacher is not None
    request = ScoreRequest(support=support or top_k(3, by="union"))
    return teacher.score(rollouts, [r.prompt for r in rollouts], request)


def teacher(
    rule: TeacherRule, student: LanguageModel, model: LanguageModel | None = None, **options: Any
) -> LocalTeacher:
    built = local_teacher(rule, student, model, **{"micro_batch_tokens": 60, **options})
    assert built is not None
    return built


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("support", SUPPORTS, ids=lambda support: support.kind)
def test_score_equals_own_forward_of_model(family: str, support: Any):
    student, model = tiny(), tiny(family, seed=1, padding_rows=3)
    rollouts = written(student, "a", "bcdefghab", "hg")
    contexts = [replace(r.prompt, content="gg" + str(r.prompt.content)) for r in rollouts]
    got = teacher(external(), student, model).score(rollouts, contexts, ScoreRequest(support=support, temperature=2.0))
    for rollout, context, scores in zip(rollouts, contexts, got, strict=True):
        read = model.tokenizer(context.content).input_ids
        with torch.no_grad():
            logits = full_logits(double(model), read, rollout.response_ids, model.vocabulary)
        log_p = (logits / 2.0).log_softmax(-1).float()
        torch.testing.assert_close(
            scores.teacher_logp, log_p.gather(-1, rollout.response_ids[:, None])[:, 0], atol=1e-5, rtol=1e-5
        )
        if support.kind == "top_k":
            expected = log_p.gather(-1, scores.support_ids)
            torch.testing.assert_close(scores.teacher_support_logp, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("support", SUPPORTS, ids=lambda support: support.kind)
@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10**6])
def test_score_reads_shared_prefix_once(
    family: str, support: Any, micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    student, model = tiny(), tiny(family, seed=1)
    rollouts = written(student, "a", "bcdefghab", "hg")
    contexts = [replace(r.prompt, content=LETTERS * 3 + str(r.prompt.content)) for r in rollouts]
    scorer = teacher(external(), student, model, micro_batch_tokens=micro_batch_tokens)
    read: list[int] = []
    original = LanguageModel.forward

    def counted(lm: LanguageModel, input_ids: Tensor, **kwargs: Any) -> Any:
        read.append(input_ids.numel())
        return original(lm, input_ids, **kwargs)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    got = scorer.score(rollouts, contexts, ScoreRequest(support=support, temperature=1.0))
    shared, _ = sum(read), read.clear()
    monkeypatch.setattr(forward, "SHORTEST_SHARED_PREFIX", 10**6)
    expected = scorer.score(rollouts, contexts, ScoreRequest(support=support, temperature=1.0))
    assert_same_scores(got, expected)
    assert micro_batch_tokens == 1 or shared < sum(read)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1] * 20 + [2], [1] * 20 + [3]], [20, 20]),
        ([[1] * 20, [1] * 20], [19, 19]),  # a prompt's last token predicts
        ([[1] * 20, [1] * 17], [16, 16]),
        ([[1] * 15 + [2], [1] * 15 + [3]], None),  # too short to pay off
        ([[1] * 30, [2] * 30], None),
        ([[1] * 30, [1] * 5], None),
        ([[1] * 30, [2] * 20, [1] * 30, [2] * 20], [29, 19, 29, 19]),  # two groups
        ([[5] * 20 + [1] * 30, [5] * 20 + [2] * 30] * 2, [49, 49, 49, 49]),  # groups spare more than what all share
        ([[1], [2] * 30, [2] * 30], None),  # nothing to read before the first
    ],
)
def test_shared_prefixes_finds_common_prefixes(rows: list[list[int]], expected: list[int] | None):
    for order in (rows, rows[::-1]):
        prefixes = shared_prefixes(order)
        if prefixes is None:
            assert expected is None
            continue
        assert expected is not None
        assert sorted(map(len, prefixes)) == sorted(expected)
        assert all(list(prefix) == row[: len(prefix)] for prefix, row in zip(prefixes, order, strict=True))


def test_score_is_independent_of_batch():
    student, model = tiny(), tiny("gemma2", seed=1)
    rollouts = written(student, "a", "bcdefghab", "hg")
    expected = [scores_of(teacher(external(), student, model), [r])[0] for r in rollouts]
    for tokens in (1, 25, 10**6):
        assert_same_scores(
            scores_of(teacher(external(), student, model, micro_batch_tokens=tokens), rollouts), expected
        )


def move(lm: LanguageModel, seed: int, size: float = 0.3) -> None:
    """What an optimiser does: change everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def with_lora(lm: LanguageModel, **settings: Any) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = adapters.add_lora(copy.deepcopy(lm.model), **{**LORA, **settings})
    return wrapping.wrap(model.eval(), lm.tokenizer, name="student")


@pytest.mark.parametrize("lora", [False, True])
def test_self_frozen_scores_as_initial_student(lora: bool):
    base = tiny()
    student = with_lora(base) if lora else tiny()
    rollouts = written(base, "ab", "hgf")
    scorer = teacher(self_frozen(), student)
    expected = scores_of(teacher(external(), base, frozen_copy(base)), rollouts)
    for i in range(2):
        move(student, i)
        scorer.after_step()
    assert_same_scores(scores_of(scorer, rollouts), expected)
    assert scorer.state_dict() == {}
    if lora:
        assert scorer.base
        assert scorer.lm is student, "no second copy of the weights"
        assert student.model.active_adapters
        now = scores_of(teacher(self_live(), student), rollouts)
        assert float((now[0].teacher_logp - expected[0].teacher_logp).abs().max()) > 1e-3, "the adapter is on again"


@pytest.mark.parametrize("lora", [False, True])
def test_self_ema_follows_formula(lora: bool):
    student = with_lora(tiny()) if lora else tiny("llama_tied")
    scorer = teacher(self_ema(0.9), student)
    frozen = {name: p for name, p in parameters_of(student).items() if name not in student.trainable()}
    average = {name: p.detach().double() for name, p in student.trainable().items()}
    for i in range(5):
        move(student, i)
        scorer.after_step()
        for name, parameter in student.trainable().items():
            average[name] = 0.9 * average[name] + 0.1 * parameter.detach().double()
    mine = dict(scorer.lm.model.named_parameters())
    for name, value in average.items():
        torch.testing.assert_close(mine[name].double(), value, atol=1e-6, rtol=1e-6)
        assert not torch.equal(mine[name], dict(student.model.named_parameters())[name])
    assert all(torch.equal(mine[name], value) for name, value in frozen.items())
    assert not any(p.requires_grad for p in mine.values())
    assert bool(frozen) == lora


@pytest.mark.parametrize("lora", [False, True])
def test_self_ema_continues_equally_when_restored(lora: bool):
    def begin() -> tuple[LanguageModel, LocalTeacher]:
        student = with_lora(tiny()) if lora else tiny()
        return student, teacher(self_ema(0.5), student)

    student, scorer = begin()
    move(student, 0)
    scorer.after_step()
    saved = {name: value.clone() for name, value in scorer.state_dict().items()}
    at_save = {name: p.detach().clone() for name, p in student.trainable().items()}
    assert saved.keys() == student.trainable().keys()
    move(student, 1)
    scorer.after_step()

    resumed, again = begin()
    with torch.no_grad():
        for name, parameter in resumed.trainable().items():
            parameter.copy_(at_save[name])
    again.load_state_dict(saved)
    move(resumed, 1)
    again.after_step()
    assert all(torch.equal(p, scorer.state_dict()[name]) for name, p in again.state_dict().items())


def test_self_ema_moves_when_student_is_bfloat16():
    """Each step moves it by 1 % of a distance of 2 %: far below the spacing of bfloat16, but 63 % after 100 steps."""
    student = tiny()
    student.model.bfloat16()
    start = {name: p.float() for name, p in parameters_of(student).items()}
    scorer = teacher(self_ema(0.99), student)
    with torch.no_grad():
        for parameter in student.trainable().values():
            parameter.mul_(1.02)
    for _ in range(100):
        scorer.after_step()
    mine = {name: p.float() for name, p in parameters_of(scorer.lm).items()}
    whole = sum(float((p.float() - start[name]).abs().sum()) for name, p in parameters_of(student).items())
    moved = sum(float((p - start[name]).abs().sum()) for name, p in mine.items())
    assert moved / whole == pytest.approx(1 - 0.99**100, rel=0.1)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_self_ema_is_live_or_frozen_at_ends_of_decay(decay: float):
    student = tiny()
    start = parameters_of(student)
    scorer = teacher(self_ema(decay), student)
    move(student, 0)
    scorer.after_step()
    expected = start if decay == 1.0 else parameters_of(student)
    for name, value in parameters_of(scorer.lm).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_self_live_scores_as_current_student():
    student = tiny()
    rollouts = written(student, "ab", "hgf")
    scorer = teacher(self_live(), student)
    move(student, 0)
    scorer.after_step()
    assert scorer.lm is student
    assert_same_scores(
        scores_of(scorer, rollouts), scores_of(teacher(external(), student, frozen_copy(student)), rollouts)
    )
    assert scorer.state_dict() == {}


def test_frozen_copy_leaves_student_trainable():
    student = tiny()
    copy_ = teacher(self_frozen(), student).lm
    assert all(p.requires_grad for p in student.model.parameters())
    assert not any(p.requires_grad for p in copy_.model.parameters())
    mine = {p.data_ptr() for p in student.model.parameters()}
    assert not any(p.data_ptr() in mine for p in copy_.model.parameters())


def test_frozen_copy_shares_frozen_parameters():
    student = with_lora(tiny())
    copy_ = frozen_copy(student)
    theirs = dict(copy_.model.named_parameters())
    for name, parameter in student.model.named_parameters():
        assert (theirs[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad)


def test_offload_keeps_scores_and_moves_model_back(monkeypatch: pytest.MonkeyPatch):
    student, model = tiny(), tiny(seed=1)
    rollouts = written(student, "ab", "hgf")
    moves: list[torch.device] = []
    original = nn.Module.to

    def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        moves.append(args[0])
        return original(module, *args, **kwargs)

    plain = scores_of(teacher(external(), student, model), rollouts)
    monkeypatch.setattr(nn.Module, "to", recorded)
    scorer = teacher(external(), student, model, offload=True)
    for support in SUPPORTS:
        scores_of(scorer, rollouts, support)
    assert_same_scores(scores_of(scorer, rollouts), plain, atol=0.0)
    assert moves == [student.device, model.device] * 4
    assert model.device == torch.device("cpu")


def test_local_teacher_head_needs_no_gradient():
    student = tiny("phi")
    head = teacher(self_live(), student).head()
    assert not head.weight.requires_grad
    assert head.bias is not None
    assert not head.bias.requires_grad


@pytest.mark.parametrize(
    ("characters", "differences"),
    [
        ("abcdefgh", {"exist only in the teacher": "gh"}),
        ("abc", {"exist only in the student": "def"}),
        ("abcdfe", {"have another id": "ef"}),
        ("fabcde", {"have another id": "abcdef"}),
        ("abcdeghij", {"exist only in the student": "f", "exist only in the teacher": "ghij"}),
    ],
)
def test_local_teacher_refuses_other_vocabulary(characters: str, differences: dict[str, str]):
    student = tiny(tokenizer=character_tokenizer("abcdef"), name="small")
    other = tiny(tokenizer=character_tokenizer(characters), name="big")
    with pytest.raises(AlignmentError) as caught:
        teacher(external(), student, other)
    message = str(caught.value)
    assert message.startswith(f"The tokenizers of small (8 tokens) and big ({len(characters) + 2}) differ: ")
    assert "Use a teacher of the student's family" in message
    found = re.findall(r"(\d+) tokens (.*?) \((.*?)\)", message.partition("differ: ")[2])
    assert {what: int(count) for count, what, _ in found} == {what: len(t) for what, t in differences.items()}
    for _, what, named in found:
        tokens = re.findall(r"'(.)'", named)
        assert set(tokens) <= set(differences[what])
        assert len(set(tokens)) == min(3, len(differences[what]))
        assert named.endswith(", ...") == (len(differences[what]) > 3)


def test_check_same_tokens_names_tokens_in_order_of_ids():
    with pytest.raises(AlignmentError, match=r"8 tokens exist only in the teacher \('c', 'd', 'e', \.\.\.\)"):
        check_same_tokens(character_tokenizer("ab"), character_tokenizer("abcdefghij"))


def test_sft_refuses_teacher_with_other_token_ids(tmp_path: Path):
    """No scores are compared in sequence-level distillation, but the teacher's ids are the student's targets."""
    with pytest.raises(AlignmentError, match="have another id"):
        opd.distill(
            student=tiny(tokenizer=character_tokenizer("abcd")).model,
            teacher=tiny(tokenizer=character_tokenizer("dcba")).model,
            tokenizer=character_tokenizer("abcd"),
            teacher_tokenizer=character_tokenizer("dcba"),
            method="sft",
            options={"source": "teacher"},
            prompts=["a", "b"],
            steps=1,
            sampling={"max_completion_length": 4},
            output_dir=tmp_path / "run",
            quiet=True,
        )


def test_check_same_tokens_accepts_equal_tokens():
    check_same_tokens(character_tokenizer("abcdef"), character_tokenizer("abcdef"))


def test_teacher_rules_refuse_missing_model_or_wrong_decay():
    with pytest.raises(ConfigError, match=r"the stage names none\. Set the stage's `teacher`"):
        local_teacher(external(), tiny(), None, micro_batch_tokens=8)
    with pytest.raises(ConfigError, match=r"lies between 0 \(live\) and 1 \(frozen\), got 1.1"):
        self_ema(1.1)


def test_score_refuses_context_beyond_positions():
    student, model = tiny(), tiny(seed=1, max_position_embeddings=24)
    rollout = rollout_of(student, Prompt(id=0, content="ab"), [2, 3, 1])
    scorer = teacher(external(), student, model)
    with pytest.raises(DataError, match=r"would read 27 tokens .*but has only 24 positions"):
        scorer.score([rollout], [Prompt(id=0, content=LETTERS * 3)], ScoreRequest(support=sampled(), temperature=1.0))


# --- models ---------------------------------------------------------------------------------------------------------


def test_wrap_refuses_unknown_logits(monkeypatch: pytest.MonkeyPatch):
    lm = tiny(name="strange")
    head = lm.model.get_output_embeddings()
    original = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: original(hidden) * 1.2)
    with pytest.raises(
        ConfigError, match=r"strange: LlamaForCausalLM computes logits in a way that opd does not support.*up to"
    ):
        wrapping.wrap(lm.model, lm.tokenizer, name="strange")


def test_wrap_refuses_multiplier_unknown_to_config():
    lm = tiny("cohere", name="strange")
    lm.model.config.logit_scale = 1.0  # the model has kept its own
    with pytest.raises(ConfigError, match="computes logits in a way that opd does not support"):
        wrapping.wrap(lm.model, lm.tokenizer, name="strange")


def test_wrap_refuses_head_smaller_than_vocabulary():
    model = tiny(tokenizer=character_tokenizer("abc")).model
    with pytest.raises(ConfigError, match=r"ids up to 9, but the output layer has only 5 rows.*resize_token"):
        wrapping.wrap(model, character_tokenizer(LETTERS), name="short")


def test_wrap_refuses_missing_tokenizer_or_eos():
    lm = tiny()
    with pytest.raises(ConfigError, match="pass `tokenizer=`"):
        wrapping.wrap(lm.model, None)
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.eos_token = None
    lm.model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        wrapping.wrap(lm.model, tokenizer)


HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16}
GROUPED = {**HEADS, "num_key_value_heads": 2, "intermediate_size": 32}
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "attention_dropout": 0.5},
    "qwen3": {**GROUPED, "head_dim": 8, "attention_dropout": 0.5},
    "gemma2": {**GROUPED, "head_dim": 8, "attention_dropout": 0.5},
    "phi": {**GROUPED, "attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "phi3": {**GROUPED, "attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "stablelm": {**GROUPED, "attention_dropout": 0.5, "hidden_dropout": 0.5},
    "starcoder2": {**GROUPED, "attention_dropout": 0.5, "residual_dropout": 0.5, "embedding_dropout": 0.5},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt_bigcode": {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt_neox": {**HEADS, "intermediate_size": 32, "attention_dropout": 0.5, "hidden_dropout": 0.5},
    "opt": {**HEADS, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.5, "attention_dropout": 0.5},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": {**HEADS, "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "xglm": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32, "dropout": 0.5},
}


@pytest.mark.parametrize("model_type", DROPOUT)
def test_wrap_turns_dropout_off_in_training(model_type: str):
    lm = of_type(model_type, **DROPOUT[model_type])
    ids = torch.tensor([lm.tokenizer(LETTERS).input_ids])
    lm.model.train()
    training = [lm.hidden(ids) for _ in range(3)]
    lm.model.eval()
    assert all(torch.equal(hidden, lm.hidden(ids)) for hidden in training)


def some_step(lm: LanguageModel) -> Gradient:
    other = tiny(seed=1)
    method = methods.build("reverse_kl", {})
    rollouts = write(method, lm, other, PROMPTS, Sampling(max_completion_length=6))
    return step(method, lm, teacher_of(method, lm, other), rollouts)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_gives_equal_gradient(family: str, lora: bool, monkeypatch: pytest.MonkeyPatch):
    from torch.utils import checkpoint as torch_checkpoint

    plain = tiny(family)
    other = tiny(family)
    other.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora:
        other.model.enable_input_require_grads()
        plain, other = with_lora(plain), with_lora(other)
        move(plain, 0)
        move(other, 0)
    calls: list[int] = []
    original = torch_checkpoint._checkpoint_without_reentrant_generator

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch_checkpoint, "_checkpoint_without_reentrant_generator", counted)
    expected = some_step(plain)
    assert not calls
    got = some_step(other)
    assert calls, "checkpointing is on"
    assert expected.norm > 0.1
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert got.distance(expected) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_add_lora_trains_adapters_alone(family: str):
    base = tiny(family)
    student = with_lora(base)
    assert student.adapters
    assert not base.adapters
    assert student.trainable()
    assert all("lora_" in name for name in student.trainable())
    assert not any("lm_head" in name for name in student.trainable())
    before = parameters_of(student)
    optimiser = optimisers.build(student.trainable(), OptimizerSection(learning_rate=0.01), 10)
    for _ in range(2):
        got = some_step(student)
        for name, parameter in student.trainable().items():
            parameter.grad = got.grads[name]
        optimiser.step()
    after = parameters_of(student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(student.trainable())


def test_add_lora_refuses_output_layer():
    with pytest.raises(ConfigError, match="Leave the output layer out of the LoRA target modules"):
        with_lora(tiny(), target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_save_gives_equal_logits_when_loaded_by_transformers(family: str, lora: bool, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = tiny(family, padding_rows=3)
    if lora:
        lm = with_lora(lm)
        move(lm, 0)
    ids = torch.tensor([lm.tokenizer(LETTERS).input_ids])
    names, before = set(lm.trainable()), parameters_of(lm)
    with torch.no_grad():
        expected = lm.model(input_ids=ids).logits
    saving.save(lm, tmp_path / "saved")
    assert set(lm.trainable()) == names, "saving leaves the model in training"
    assert all(torch.equal(p, before[name]) for name, p in parameters_of(lm).items())

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, atol=1e-4 if lora else 0.0, rtol=0)
    assert wrapping.wrap(loaded, tokenizer).vocabulary == lm.vocabulary
    if lora:
        with lm.model.disable_adapter(), torch.no_grad():
            plain = lm.model(input_ids=ids).logits
        assert float((plain - expected).abs().max()) > 1e-2, "the adapter mattered"


def test_casting_once_casts_weights_once_per_response(monkeypatch: pytest.MonkeyPatch):
    lm = replace(tiny(hidden=32, seed=1), autocast=True)
    asked = prompts_of("ab", "c")
    weights = {parameter.data_ptr() for parameter in lm.model.parameters()}
    casts: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.bfloat16 and args and isinstance(args[0], Tensor):
                casts.append(int(args[0].dtype == torch.float32 and args[0].data_ptr() in weights))
            return out

    with Counting():
        together = sampler(lm)(asked, seed=(0, 0))
    once = sum(casts)
    casts.clear()
    monkeypatch.setattr(type(lm), "casting_once", lambda self: contextlib.nullcontext())
    with Counting():
        apart = sampler(lm)(asked, seed=(0, 0))
    written = max(len(rollout.response_ids) for rollout in together)
    assert 0 < once < sum(casts) / min(written, 4)
    assert all(same(a, b) for a, b in zip(together, apart, strict=True))
    assert torch.is_autocast_enabled("cpu") is False
