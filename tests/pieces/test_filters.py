"""What is trained of what was written: filters of responses, masked token sequences, steps in which nothing is left."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import LETTERS, batch_of, prompts_of, rollout_of, said, teacher_of, tiny
from support.pairs import sentence_piece
from support.runs import CHARACTERS, command, forbid, one_stage, prepare, sums, tiny_model, write_rows

import opd
from opd import methods
from opd.errors import ConfigError, TrainingError
from opd.method import Method
from opd.models import wrapping
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.pieces import filters, normalise, token_sequences, weights
from opd.pieces.needs import Input, Needs, Trait
from opd.pieces.signals import divergence
from opd.pieces.supports import top_k
from opd.recipe.schema import ModelSpec
from opd.stage import checkpoint
from opd.types import Rollout

# --- filters ---------------------------------------------------------------------------------------------------------


def words(n: int, seed: int = 0) -> str:
    """`n` characters without a repetition of any length that matters."""
    rng = random.Random(seed)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(n))


def test_repeats_a_line_counts_long_lines():
    line = "so we have to wait for it"
    assert filters.repeats_a_line("\n".join([line] * 5))
    assert filters.repeats_a_line("\n".join(f"  {line} \n{i}" for i in range(5)))
    assert not filters.repeats_a_line("\n".join([line] * 4))
    assert not filters.repeats_a_line("\n".join(["short"] * 50))
    assert filters.repeats_a_line("a" * 20 + "\n" + "a" * 20, times=2)
    assert not filters.repeats_a_line("a" * 19 + "\n" + "a" * 19, times=2)


def test_repeats_a_window_finds_returning_window():
    part = words(100)
    between = [words(50, seed=i) for i in (1, 2, 3)]
    assert filters.repeats_a_window(part + between[0] + part + between[1] + part)
    assert not filters.repeats_a_window(part + between[0] + part)
    assert not filters.repeats_a_window(words(3000))
    assert not filters.repeats_a_window("")
    # A period of 7 is no multiple of the stride: its windows meet every 70 characters.
    assert filters.repeats_a_window("abcdefg" * 40)


def test_repeats_a_block_finds_three_in_row():
    block, long = words(50), words(5000, seed=4)
    assert filters.repeats_a_block(long + block * 3 + "end")
    assert not filters.repeats_a_block(long + block * 2 + "end")
    assert not filters.repeats_a_block(long[:4800] + block * 3), "a short text is not looked at"
    assert filters.repeats_a_block("x" + block * 3, beyond=0)
    assert not filters.repeats_a_block(block + "-" + block + "-" + block, beyond=0)
    assert filters.repeats_a_block("aaaa" * 2, beyond=0, size=2, times=4)


@pytest.mark.parametrize("seed", range(5))
def test_repeats_a_block_equals_search(seed: int):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(60))
    for size in (1, 2, 3, 5):
        for times in (2, 3, 4):
            found = any(
                text[i : i + size] * times == text[i : i + size * times] for i in range(len(text) - size * times + 1)
            )
            assert filters.repeats_a_block(text, beyond=0, size=size, times=times) == found


def test_degenerate_is_true_when_text_repeats_or_is_empty():
    assert filters.degenerate("  \n ")
    assert filters.degenerate("abcdefg" * 40)
    assert filters.degenerate("\n".join(["so we have to wait for it"] * 5))
    assert not filters.degenerate("7+5+0=12;12")


# --- the first response that passes ----------------------------------------------------------------------------------

LM = tiny()


def written(*groups: str, **columns: Any) -> list[Rollout]:
    """Groups of responses: '+' has reward 1, '-' has 0, '~' has 1 and was cut."""
    out: list[Rollout] = []
    for prompt, group in zip(prompts_of(*LETTERS[: len(groups)]), groups, strict=True):
        for i, kind in enumerate(group):
            one = rollout_of(LM, prompt, [3, 4], sample=i, reward=0.0 if kind == "-" else 1.0, **columns)
            out.append(replace(one, finished=kind != "~"))
    return out


def kept(rollouts: list[Rollout]) -> list[bool]:
    return [bool(r.trained.any()) for r in rollouts]


def test_first_passing_trains_first_that_passes():
    rollouts = written("-+-+", "+", "--", "~+")
    first = filters.first_passing(filters.correct())(rollouts)
    assert kept(first) == [False, True, False, False, True, False, False, True, False]
    both = filters.first_passing(filters.correct(), filters.clean())(rollouts)
    assert kept(both) == [False, True, False, False, True, False, False, False, True]
    assert all(bool(r.trained.all()) for r in rollouts), "what was given is as it was"
    assert [r.response_ids.tolist() for r in first] == [r.response_ids.tolist() for r in rollouts]


def test_first_passing_splits_groups_when_prompt_repeats():
    (prompt,) = prompts_of("a")
    rollouts = [rollout_of(LM, prompt, [3], sample=i, reward=1.0) for i in (0, 1, 0, 1)]
    assert kept(filters.first_passing(filters.correct())(rollouts)) == [True, False, True, False]


def test_clean_requires_given_text():
    (prompt,) = prompts_of("a")
    yes, no = rollout_of(LM, prompt, [3, 4]), rollout_of(LM, prompt, [5])
    assert yes.text == "bc"
    assert filters.clean("c")(yes)
    assert not filters.clean("c")(no)
    assert not filters.clean()(replace(yes, text=" "))


def test_filters_declare_needs():
    correct = filters.first_passing(filters.correct())
    assert said(filters.everything()) == set()
    assert said(correct) == {"filters", "reward"}
    assert said(filters.first_passing(filters.clean())) == {"filters"}
    assert said(filters.in_turn(correct, filters.everything())) == {"filters", "reward"}


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, set()),
        ({"keep": "clean", "must_contain": "boxed"}, {"filters"}),
        ({"keep": "correct"}, {"filters", "reward"}),
        ({"keep": "both"}, {"filters", "reward"}),
    ],
)
def test_sft_declares_needs_of_options(options: dict[str, Any], needs: set[str]):
    method = methods.build("sft", options)
    assert said(method.source) == {"response", "off_policy"}
    assert said(method.filter, method.signal) == needs


@pytest.mark.parametrize("what", ["all", "correct"])
def test_sft_refuses_must_contain_without_clean(what: str):
    with pytest.raises(
        ConfigError, match=rf"`must_contain: x` .* but `keep: {what}` does not select .* Set keep: clean"
    ):
        methods.build("sft", {"keep": what, "must_contain": "x"})


# --- token sequences -------------------------------------------------------------------------------------------------


def test_covered_marks_first_or_every_sequence():
    ids = [1, 2, 1, 2, 3, 1, 1, 2]
    assert token_sequences.covered(ids, [[1]], "first") == [True] + [False] * 7
    assert token_sequences.covered(ids, [[1]], "every") == [i == 1 for i in ids]
    assert token_sequences.covered(ids, [[1, 2]], "every") == [True, True, True, True, False, False, True, True]
    assert token_sequences.covered(ids, [[2, 3], [9], [1, 1]], "first") == [False] * 3 + [True] * 4 + [False]
    assert token_sequences.covered([1], [[1, 2]], "every") == [False]
    assert token_sequences.covered([7, 7, 7], [[7, 7]], "every") == [True] * 3


def test_encoded_raises_config_error_when_token_is_unknown():
    tokenizer = character_tokenizer(LETTERS)
    assert token_sequences.encoded(["ab", [3, 2]], tokenizer) == ((2, 3), (3, 2))
    assert token_sequences.encoded(["<eos>"], tokenizer) == ((1,),)
    with pytest.raises(ConfigError, match=r"cannot encode the text to mask 'a!': .* or leave it out of the masked"):
        token_sequences.encoded(["a!"], tokenizer)
    with pytest.raises(
        ConfigError, match=r"has the ids 0 to 9, but the tokens to mask include \[10\]\. Correct the ids"
    ):
        token_sequences.encoded([[3, 10]], tokenizer)


@pytest.mark.parametrize("prefix", [True, False])
def test_encoded_has_no_prefix_space_of_sentence_piece(prefix: bool):
    tokenizer = sentence_piece("▁ a", "b c", characters="abc\n", prefix=prefix)
    found = token_sequences.encoded(["a", " a", "bc"], tokenizer)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in found] == [["a"], ["▁a"], ["bc"]]


@pytest.mark.parametrize("piece", [filters.without_tokens, weights.mask_tokens])
def test_mask_tokens_refuses_wrong_sequences(piece: Any):
    with pytest.raises(ConfigError, match=r"a list with at least one entry, got \[\]"):
        piece([])
    with pytest.raises(ConfigError, match=r"a list with at least one entry, got '<think>'"):
        piece("<think>")
    with pytest.raises(ConfigError, match=r"is empty in \['a', ''\]"):
        piece(["a", ""])
    with pytest.raises(ConfigError, match=r"'first' or at 'every' occurrence, got 'last'"):
        piece(["a"], "last")


@pytest.mark.parametrize("piece", [filters.without_tokens, weights.mask_tokens])
def test_mask_tokens_raises_config_error_without_tokenizer(piece: Any):
    with pytest.raises(ConfigError, match=rf"{piece.__name__} needs the student's tokenizer, .* method.with_tok"):
        piece(["a"])([])


def masked_method(**pieces: Any) -> Method:
    method = Method(
        support=top_k(3), signal=divergence(form="renormalised"), normalise=normalise.per("token"), **pieces
    )
    return method.with_tokenizer(LM.tokenizer)


def test_without_tokens_lowers_count_and_mask_tokens_does_not():
    prompts = prompts_of("a", "b")
    rollouts = [
        rollout_of(LM, prompts[0], [2, 3, 2, 4]),  # a b a c
        rollout_of(LM, prompts[1], [4, 2, 3], trained=[True, False, True]),  # c a b
    ]
    teacher = teacher_of(masked_method(), LM, tiny(seed=1))
    for occurrences, expected in (("first", [[0, 1, 1, 1], [1, 0, 1]]), ("every", [[0, 1, 0, 1], [1, 0, 1]])):
        out = masked_method(filter=filters.without_tokens(["a", "hh"], occurrences))
        rows = out.filter(rollouts)
        assert [r.trained.int().tolist() for r in rows] == expected
        batch = batch_of(out, LM, teacher, rows)
        assert out.normalise(batch).count == sum(map(sum, expected))

        zero = masked_method(weight=weights.mask_tokens(["a", "hh"], occurrences))
        batch = batch_of(zero, LM, teacher, rollouts)
        got = zero.weight(batch)
        trained = [[1, 1, 1, 1], [1, 0, 1]]
        weight = [[0, 1, 1, 1], [1, 0, 1]] if occurrences == "first" else [[0, 1, 0, 1], [1, 0, 1]]
        assert [got[i, : len(row)].int().tolist() for i, row in enumerate(weight)] == weight
        assert zero.normalise(batch).count == sum(map(sum, trained))


def test_with_tokenizer_reaches_combined_pieces():
    two = weights.times(weights.every_token(), weights.mask_tokens(["b"]))
    method = masked_method(
        weight=two, filter=filters.in_turn(filters.without_tokens(["a"]), filters.without_tokens([[4]]))
    )
    (prompt,) = prompts_of("a")
    rows = method.filter([rollout_of(LM, prompt, [2, 3, 4, 5])])
    assert rows[0].trained.tolist() == [False, True, False, True]
    batch = batch_of(method, LM, teacher_of(method, LM, tiny(seed=1)), rows)
    assert method.weight(batch).tolist() == [[1.0, 0.0, 1.0, 1.0]]
    assert method.needs == Needs(
        inputs=frozenset({Input.TEACHER_MODEL}),
        traits=frozenset({Trait.LOOKS_AT_SAMPLED_TOKEN, Trait.MINIMISES_DIVERGENCE}),
    )


def test_local_support_matching_masks_first_of_each():
    method = methods.build("local_support_matching", {"k": 3, "mask_tokens": ["a", "bc", [5]]}).with_tokenizer(
        LM.tokenizer
    )
    (prompt,) = prompts_of("a")
    rows = method.filter([rollout_of(LM, prompt, [2, 3, 4, 5, 2, 3, 4, 5])])
    assert rows[0].trained.tolist() == [False] * 4 + [True] * 4


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    return tmp_path / "work"


def distilled(reward: Any, **stage: Any) -> opd.Run:
    """Three steps of learning what a teacher wrote, of two attempts a prompt."""
    student, teacher = (load_model(ModelSpec(**tiny_model(seed)), name="tiny").model for seed in (2, 1))
    return opd.distill(
        student=student,
        teacher=teacher,
        tokenizer=character_tokenizer(CHARACTERS),
        prompts=sums(0, 6),
        method="sft",
        options={"source": "teacher", "keep": "correct"},
        reward=reward,
        quiet=True,
        **{
            "steps": 3,
            "prompts_per_step": 3,
            "sampling": {"max_completion_length": 3, "n": 2},
            "optimizer": {"learning_rate": 0.01},
            **stage,
        },
    )


def test_sft_trains_only_passing_responses(work: Path):
    run = distilled(lambda prompt, text: float(text[:1] in "02468"))
    for step, row in enumerate(run.metrics):
        samples = [sample for sample in run.samples if sample["step"] == step + 1]
        if not samples:
            continue
        groups: dict[int, list[float]] = {}
        for sample in samples:
            groups.setdefault(sample["prompt_id"], []).append(sample["reward"])
        assert len(groups) == 3
        assert row["rollout/kept_share"] == pytest.approx(sum(1.0 in rewards for rewards in groups.values()) / 3)
        assert row["train/update_skipped"] == 0.0
    assert any(0 < row["rollout/kept_share"] < 1 for row in run.metrics)


def test_sft_raises_training_error_when_none_passes(work: Path):
    fails = re.escape("made no update: in all of its 3 steps no response passed the method's filter")
    with pytest.raises(TrainingError, match=fails):
        distilled(lambda prompt, text: 0.0, output_dir="none", checkpoint={"every": 1})
    metrics = [json.loads(line) for line in next(Path("none").rglob("metrics.jsonl")).read_text().splitlines()]
    assert [row["train/update_skipped"] for row in metrics] == [1.0] * 3
    assert [row["rollout/kept_share"] for row in metrics] == [0.0] * 3
    assert [row["train/tokens"] for row in metrics] == [0.0] * 3
    assert all("optim/learning_rate" not in row for row in metrics)
    saved = checkpoint.load(next(Path("none").rglob("step_000003")))
    before = load_model(ModelSpec(**tiny_model(2)), name="tiny").trainable()
    assert all(torch.equal(value, before[name]) for name, value in saved.tensors["student"].items())
    assert saved.state["updates"] == 0
    with pytest.raises(TrainingError, match=fails):  # nor is it done when it is started again
        distilled(lambda prompt, text: 1.0, output_dir="none", checkpoint={"every": 1})


def test_resume_continues_after_skipped_steps(work: Path, capsys: pytest.CaptureFixture[str]):
    """The first two steps pass nothing, the third does; a checkpoint of the second has no moments."""
    recipe = one_stage(
        method="sft",
        options={"source": "teacher", "keep": "correct"},
        reward={"name": "mine:late"},
        steps=4,
        sampling={"max_completion_length": 3, "n": 2},
        checkpoint={"every": 1, "keep": 9},
        samples_every=0,
    )
    (work / "mine.py").write_text(
        "calls = 0\n\n\ndef late(prompt, text):\n    global calls\n    calls += 1\n    return float(calls > 8)\n"
    )
    whole = opd.run(recipe)
    assert "2 of 4 steps made no update, because no response passed the method's filter" in capsys.readouterr().out
    assert [row["train/update_skipped"] for row in whole.metrics] == [1.0, 1.0, 0.0, 0.0]
    folder = next(Path("run").rglob("step_000002")).parent
    for later in ("step_000003", "step_000004"):
        __import__("shutil").rmtree(folder / later)
    for done in Path("run").rglob("done.json"):
        done.unlink()
    again = opd.run(recipe, quiet=True)  # `calls` has gone on: all pass
    assert [row["step"] for row in again.metrics] == [1, 2, 3, 4]
    assert [row["train/update_skipped"] for row in again.metrics] == [1.0, 1.0, 0.0, 0.0]
    for name, value in whole.student.state_dict().items():
        torch.testing.assert_close(value, again.student.state_dict()[name])


def test_sft_filters_data_rows(work: Path):
    write_rows(work / "rows.jsonl", [{"prompt": "1+1=", "response": "2" * n} for n in (1, 300)])
    run = opd.run(
        one_stage(
            method="sft", teacher=None, options={"keep": "clean"}, data={"path": "rows.jsonl"}, max_prompt_length=9
        )
        | {"models": {"student": longer(tiny_model(2))}},
        quiet=True,
    )
    assert [row["rollout/kept_share"] for row in run.metrics] == [0.5, 0.5]
    assert [row["train/tokens"] for row in run.metrics] == [2.0, 2.0]


def longer(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "init": {**spec["init"], "max_position_embeddings": 512}}


def test_mask_tokens_refuses_unknown_token_before_loading(work: Path, monkeypatch: pytest.MonkeyPatch):
    forbid(monkeypatch, "opd.runs.build.load_model")
    options = {"k": 4, "mask_tokens": ["<think>"]}
    recipe = one_stage(method="local_support_matching", options=options)
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    for what in ("check", "train"):
        ended = command(what, "recipe.yaml")
        assert ended.code == 2
        assert "ConfigError: The tokenizer " in ended.err
        assert "cannot encode the text to mask '<think>'" in ended.err
        assert "Correct the text, give token ids, or leave it out of the masked tokens." in ended.err


def test_mask_tokens_removes_tokens_from_training(work: Path):
    recipe = one_stage(
        method="local_support_matching",
        options={"k": 4, "mask_tokens": ["+", "1"], "mask": "every"},
        sampling={"max_completion_length": 6, "top_p": 0.9, "n": 4},
    )
    run = opd.run(recipe, quiet=True)
    tokenizer = wrapping.wrap(run.student, character_tokenizer(CHARACTERS)).tokenizer
    dropped = set(tokenizer("+1", add_special_tokens=False).input_ids)
    for row in run.metrics:
        samples = [sample for sample in run.samples if sample["step"] == row["step"]]
        if samples:
            left = sum(token not in dropped for sample in samples for token in sample["response_ids"])
            assert row["train/tokens"] == left


def test_reverse_kl_with_sampled_tail_needs_with_sampled(work: Path):
    (work / "mine2.py").write_text(
        "from opd.pieces import signals, supports\nfrom opd.method import Method\n\n\ndef method():\n"
        "    return Method(support=supports.top_k(3), signal=signals.reverse_kl_with_sampled_tail())\n"
    )
    with pytest.raises(ConfigError, match=r"last token of the support as the sampled token.*with_sampled=True"):
        opd.run(one_stage(method="mine2:method"), quiet=True)
