"""Teachers that write for a source: what they are shown, their random numbers, and the file of their texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import tiny

from opd.errors import RunError
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.samplers.authors import TeacherAuthor, TextCache, fingerprint
from opd.samplers.hf import TransformersSampler
from opd.types import Prompt, Rollout, Sampling

SAMPLING = Sampling(max_completion_length=5, n=7)
PROMPTS = [Prompt(id=3, content="ab"), Prompt(id=0, content="c"), Prompt(id=9, content="dde")]
CONTEXTS = [Prompt(id=77, content="hhab"), Prompt(id=77, content="hint c"), Prompt(id=77, content="hint dde")]
SEED = (0, 4)


def author(
    name: str = "teacher", cache: TextCache | None = None, seed: int = 1, teacher: LanguageModel | None = None
) -> TeacherAuthor:
    return TeacherAuthor(
        name=name,
        teacher=teacher or tiny(seed=seed),
        student=tiny(),
        sampling={None: SAMPLING},
        cache=cache,
    )


def ids(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.response_ids.tolist() for rollout in rollouts]


def test_author_reads_contexts_and_gives_the_student_the_prompts():
    one = author()
    written = one(PROMPTS, seed=SEED, contexts=CONTEXTS, n=2)
    assert [(r.prompt, r.sample) for r in written] == [(p, s) for p in PROMPTS for s in (0, 1)]
    read = [tuple(render(p, one.student.tokenizer, one.student.template_options)) for p in PROMPTS]
    assert [r.prompt_ids for r in written] == [ids for ids in read for _ in (0, 1)]
    assert all(r.sampler_logp is None and r.policy_logp is None for r in written)
    assert ids(written) != ids(one(PROMPTS, seed=SEED, n=2))  # the same random numbers, another context


def test_author_continues_the_count_of_samples():
    one = author()
    at_once = one(PROMPTS, seed=SEED, n=3)
    first, rest = one(PROMPTS, seed=SEED, n=1), one(PROMPTS, seed=SEED, n=2, first=1)
    assert [r.sample for r in rest] == [1, 2] * 3
    in_turn = [*first[0:1], *rest[0:2], *first[1:2], *rest[2:4], *first[2:3], *rest[4:6]]
    assert ids(in_turn) == ids(at_once)
    assert len({tuple(row) for row in ids(at_once[:3])}) > 1


def test_author_random_numbers_are_its_own():
    """Not those of the student, nor of an author of the same weights under another name."""
    lm = tiny(seed=1)
    mine, others = author(teacher=lm), author("other", teacher=lm)
    as_student = TransformersSampler(lm=lm, sampling=replace(SAMPLING, n=1))(PROMPTS, seed=SEED)
    written = [ids(one(PROMPTS, seed=SEED)) for one in (mine, others)]
    assert written[0] != written[1]
    assert ids(as_student) not in written
    assert ids(mine(PROMPTS[::-1], seed=SEED))[::-1] == written[0]  # the order of the prompts changes nothing
    assert ids(mine(PROMPTS, seed=(0, 5))) != written[0]


def test_author_takes_the_sampling_of_each_task():
    tasks = {"a": replace(SAMPLING, max_completion_length=2), "b": replace(SAMPLING, max_completion_length=4)}
    one = author()
    one.sampling = tasks
    prompts = [replace(p, task=t) for p, t in zip(PROMPTS, ("b", "a", "b"), strict=True)]
    written = one(prompts, seed=SEED, n=2)
    assert [r.prompt.task for r in written] == ["b", "b", "a", "a", "b", "b"]
    assert [r.sampling.max_completion_length for r in written if r.sampling] == [4, 4, 2, 2, 4, 4]
    greedy = replace(SAMPLING, temperature=0.0, max_completion_length=3)
    assert {len(r.response_ids) for r in one(prompts, seed=SEED, sampling=greedy)} <= {1, 2, 3}


def test_cache_returns_each_call_once_and_token_for_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = author(cache=TextCache(tmp_path))
    plain, hinted = before(PROMPTS, seed=SEED, n=2), before(PROMPTS, seed=SEED, contexts=CONTEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(TransformersSampler, "__call__", None)  # a call of the sampler fails
        after = author(cache=TextCache(tmp_path))
        for was, again in (
            (hinted, after(PROMPTS, seed=SEED, contexts=CONTEXTS)),
            (plain, after(PROMPTS, seed=SEED, n=2)),
        ):
            assert ids(was) == ids(again)
            for a, b in zip(was, again, strict=True):
                assert replace(a, response_ids=b.response_ids, trained=b.trained, turn=b.turn) == b
                assert torch.equal(a.trained, b.trained)
    lines = [json.loads(line) for line in (tmp_path / "texts-0.jsonl").read_text().splitlines()]
    assert [(line["author"], line["step"], len(line["responses"])) for line in lines] == [
        ("teacher", 4, 6),
        ("teacher", 4, 3),
    ]


@pytest.mark.parametrize("change", ["weights", "name", "step", "context", "sampling", "first", "student's prompt"])
def test_cache_is_not_read_for_another_call(tmp_path: Path, change: str):
    author(cache=TextCache(tmp_path))(PROMPTS, seed=SEED, contexts=CONTEXTS)
    size = (tmp_path / "texts-0.jsonl").stat().st_size
    one = author("other" if change == "name" else "teacher", TextCache(tmp_path), seed=2 if change == "weights" else 1)
    prompts = [replace(PROMPTS[0], id=4), *PROMPTS[1:]] if change == "student's prompt" else PROMPTS
    one(
        prompts,
        seed=(0, 5) if change == "step" else SEED,
        contexts=CONTEXTS[::-1] if change == "context" else CONTEXTS,
        first=1 if change == "first" else 0,
        sampling=replace(SAMPLING, top_k=2) if change == "sampling" else None,
    )
    assert (tmp_path / "texts-0.jsonl").stat().st_size > size


def test_cache_survives_a_partial_line_and_reads_other_processes(tmp_path: Path):
    before = author(cache=TextCache(tmp_path, rank=1))
    written = before(PROMPTS, seed=SEED)
    file = tmp_path / "texts-1.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    cache = TextCache(tmp_path, rank=0)
    assert ids(author(cache=cache)(PROMPTS, seed=SEED)) == ids(written)
    assert not (tmp_path / "texts-0.jsonl").exists()
    author(cache=TextCache(tmp_path, rank=1))(PROMPTS, seed=(0, 9))
    assert file.read_bytes().startswith(whole + b"{")
    assert len(file.read_bytes().splitlines()) == 2
    file.write_text('{"other": 1}\n')
    with pytest.raises(RunError, match="not a text"):
        author(cache=TextCache(tmp_path))(PROMPTS, seed=SEED)


def test_fingerprint_differs_between_weights():
    assert fingerprint(tiny(seed=1)) == fingerprint(tiny(seed=1))
    assert fingerprint(tiny(seed=1)) != fingerprint(tiny(seed=2))
