"""Debates: what each teacher reads and when, confidences and weights, and what is counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from support.models import LETTERS, batch_of, rollout_of, sampler, tiny
from support.runs import CHARACTERS, sums, tiny_model

import opd
from opd import methods
from opd.errors import ConfigError, DataError
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.pieces import debate
from opd.pieces.debate import NAME, Rules, Turn
from opd.recipe.schema import ModelSpec
from opd.samplers.authors import TeacherAuthor
from opd.samplers.writers import ReferenceWriter
from opd.teachers.local import LocalTeacher
from opd.teachers.mixed import MixedTeacher
from opd.types import Prompt, Rollout, Sampling, Writers

SHORT = Rules(opening="{prompt}", reply="a{prompt}{debate}", reads="b{prompt}{debate}", turn="{text}", tag=r"g([a-h])")
TEXTS = {"opening": "{prompt}", "reply": "{prompt}+{debate}", "reads": "{prompt}={debate}", "turn": "{text}"}


def response(text: str, finished: bool = True) -> Rollout:
    lm = tiny()
    return replace(rollout_of(lm, Prompt(id=0, content="a"), [2]), text=text, finished=finished)


def turn(teacher: str, confidence: float | None, answered: bool = True) -> Turn:
    return Turn(teacher=teacher, text="x", confidence=confidence, answered=answered)


# --- confidences and weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "confidence", "answered"),
    [
        ("4 <<CONFIDENCE=80>>", 80.0, True),
        ("<<CONFIDENCE=10>> then 4 <<CONFIDENCE=99.5>>", 99.5, True),
        ("4 <<CONFIDENCE=0>>", 0.0, True),
        ("4 <<CONFIDENCE=100>>", 100.0, True),
        ("4 <<CONFIDENCE=101>>", None, True),
        ("<<CONFIDENCE=50>> 4 <<CONFIDENCE=300>>", None, True),
        ("4 <<CONFIDENCE=-5>>", None, True),
        ("4 <<CONFIDENCE=high>>", None, True),
        ("4", None, True),
        (" \n <<CONFIDENCE=80>>", 80.0, False),
        ("", None, False),
    ],
)
def test_said_takes_last_confidence_from_0_to_100(text: str, confidence: float | None, answered: bool):
    said = Rules().said("one", response(text))
    assert (said.confidence, said.answered) == (confidence, answered)


@pytest.mark.parametrize("tau", [1.0, 0.1, 5.0])
@pytest.mark.parametrize("missing", ["uniform", "zero"])
@pytest.mark.parametrize(
    "confidences", [[80.0, 75.0], [100.0, 0.0], [50.0, 50.0, 10.0], [None, 20.0, 90.0], [None, None], [30.0]]
)
def test_weights_equal_oracle(confidences: list[float | None], missing: Any, tau: float):
    turns = [turn(f"teacher {k}", c) for k, c in enumerate(confidences)]
    got = Rules(tau=tau, missing=missing).weights(turns)
    assert list(got.values()) == pytest.approx(oracle.confidence_weights(confidences, tau, missing), abs=1e-12)


def test_weights_are_the_papers_numbers():
    """They hardly differ at the paper's tau."""
    assert Rules().weights([turn("one", 80), turn("other", 75)])["one"] == pytest.approx(0.512, abs=5e-4)
    assert Rules().weights([turn("one", 100), turn("other", 0)])["one"] == pytest.approx(0.731, abs=5e-4)


@pytest.mark.parametrize("missing", ["uniform", "zero"])
def test_weight_is_0_without_answer(missing: Any):
    rules = Rules(missing=missing)
    assert rules.weights([turn("one", 90.0, answered=False), turn("other", 10.0)]) == {"one": 0.0, "other": 1.0}
    assert rules.weights([turn("one", None, answered=False), turn("other", 10.0)]) == {"one": 0.0, "other": 1.0}
    assert rules.weights([turn("one", 90.0, answered=False), turn("other", None, answered=False)]) == {
        "one": 0.0,
        "other": 0.0,
    }


def test_weights_do_not_overflow_at_small_tau():
    got = Rules(tau=1e-5).weights([turn("one", 100.0), turn("other", 99.0)])
    assert got == {"one": 1.0, "other": 0.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rounds": -1}, r"at least one round, got -1"),
        ({"tau": 0.0}, r"`tau` divides the confidences.*got 0\.0"),
        ({"tau": math.inf}, r"above 0, got inf|finite number"),
        ({"opening": "no field"}, r"opening.*\{prompt\} \(needed\)"),
        ({"reply": "{prompt}"}, r"reply.*\{debate\} \(needed\)"),
        ({"reads": "{debate}"}, r"reads.*needs the field \{prompt\}"),
        ({"turn": "{teacher}"}, r"turn.*\{text\} \(needed\)"),
        ({"tag": "(("}, r"not a regular expression"),
        ({"tag": r"\d"}, r"one group, the number from 0 to 100.*has 0"),
        ({"beta": 1.5}, r"beta|between"),
        ({"rounds": 0, "tag": r"(\d)"}, r"`rounds: 0` is no debate, so nothing would read tag"),
    ],
)
def test_mad_opd_refuses_impossible_options(changed: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        methods.build("mad_opd", changed).signal(tokens())


def tokens() -> Any:
    from opd.types import Tokens

    logp = torch.zeros(1, 2).log_softmax(-1)
    zero = torch.zeros(1)
    both = {"student_support_logp": logp, "teacher_support_logp": logp}
    return Tokens(student_logp=zero, sampler_logp=zero, teacher_logp=zero, advantage=zero, weight=zero, **both)


# --- what each teacher reads ----------------------------------------------------------------------------------------


class Scripted:
    """An author that notes what it reads and answers with its name and the round."""

    def __init__(self, name: str) -> None:
        self.name, self.read = name, list[tuple[int, str]]()

    def __call__(self, prompts: Any, *, seed: Any, contexts: Any, first: int, **_: Any) -> list[Rollout]:
        self.read += [(first, context.content) for context in contexts]
        return [response(f"{self.name}{first}{prompt.id}") for prompt in prompts]


def test_held_shows_all_earlier_rounds_to_all_teachers():
    rules = Rules(rounds=3, opening="{teacher}:{prompt}", reply="{teacher}:{prompt}|{debate}", turn="[{round}{text}]")
    authors = {name: Scripted(name) for name in ("x", "y", "z")}
    prompts = [Prompt(id=4, content="p", teacher_id="x+y"), Prompt(id=5, content="q", teacher_id="z")]
    found = debate.held(rules, prompts, authors, (0, 0))  # type: ignore[arg-type]
    assert [[one.text for one in turns] for turns in found[0]] == [["x04", "y04"], ["x14", "y14"], ["x24", "y24"]]
    assert [[one.text for one in turns] for turns in found[1]] == [["z05"], ["z15"], ["z25"]]
    assert authors["y"].read == [
        (0, "y:p"),
        (1, "y:p|[1x04][1y04]"),
        (2, "y:p|[1x04][1y04][2x14][2y14]"),
    ]
    assert authors["z"].read[1] == (1, "z:q|[1z05]")


def test_after_debate_gives_each_teacher_its_view_and_weight():
    rounds = [[turn("x", 10.0), turn("y", None)], [turn("x", 100.0), turn("y", 0.0)]]
    rollout = replace(response("a"), prompt=Prompt(id=0, content="p", metadata={NAME: rounds}))
    rules = Rules(reads="{teacher}:{prompt}|{debate}", turn="{teacher}{round}{text},")
    (context,) = debate.after_debate(rules)([rollout])
    assert {name: one.content for name, one in context.views.items()} == {
        "x": "x:p|x1x,y1x,x2x,y2x,",
        "y": "y:p|x1x,y1x,x2x,y2x,",
    }
    assert context.teacher_weights == pytest.approx({"x": 0.7311, "y": 0.2689}, abs=1e-4)
    assert rollout.prompt.content == "p"


def test_after_debate_leaves_prompt_without_debate():
    rollout = response("a")
    assert debate.after_debate(Rules())([rollout]) == [rollout.prompt]


def test_debate_keeps_braces_of_texts():
    rules = Rules(reply="{prompt}{debate}", turn="{text}")
    rollout = replace(turn("x", None), text="{prompt}}{")
    assert rules.shown(rules.reply, Prompt(id=0, content="{a}"), "x", [[rollout]]).content == "{a}{prompt}}{"


# --- with models ----------------------------------------------------------------------------------------------------


def cast() -> tuple[LanguageModel, dict[str, LanguageModel]]:
    return tiny(seed=1), {"x": tiny(seed=2, name="x"), "y": tiny(seed=3, hidden=24, name="y")}


def writers(student: LanguageModel, lms: dict[str, LanguageModel], most: int = 4) -> Writers:
    return Writers(
        student=sampler(student, max_completion_length=5),
        reference=ReferenceWriter(student=student),
        complete=lambda rollouts, record: list(rollouts),
        authors={
            name: TeacherAuthor(
                name=name, teacher=lm, student=student, sampling={None: Sampling(max_completion_length=most)}
            )
            for name, lm in lms.items()
        },
    )


def prompts(count: int = 5) -> list[Prompt]:
    return [Prompt(id=i, content=LETTERS[i % 8] + LETTERS[(3 * i) % 8], teacher_id="x+y") for i in range(count)]


def test_debated_student_reads_prompt_alone():
    student, lms = cast()
    source, record = debate.debated(SHORT), methods.build("mad_opd", {}).record()
    got = source(prompts(), writers(student, lms), (0, 3), record)
    alone = sampler(student, max_completion_length=5)(prompts(), seed=(0, 3))
    assert [r.response_ids.tolist() for r in got] == [r.response_ids.tolist() for r in alone]
    assert [r.prompt_ids for r in got] == [r.prompt_ids for r in alone]
    assert all(len(r.prompt.metadata[NAME]) == 2 for r in got)


def test_debate_of_a_prompt_does_not_depend_on_the_others():
    """So two processes hold the debates that one process holds."""
    student, lms = cast()
    together = debate.held(SHORT, prompts(), writers(student, lms).authors, (0, 3))
    for i, prompt in enumerate(prompts()):
        assert debate.held(SHORT, [prompt], writers(student, lms).authors, (0, 3)) == [together[i]]


def test_counts_are_of_all_processes():
    student, lms = cast()
    rounds = {
        0: [[turn("x", 40.0), turn("y", 60.0)]],
        1: [[turn("x", None), replace(turn("y", 80.0), finished=False)]],
        2: [[turn("x", None, answered=False), turn("y", 90.0, answered=False)]],
    }
    rollouts = [
        rollout_of(student, Prompt(id=i, content="a", metadata={NAME: turns}), [2, 3]) for i, turns in rounds.items()
    ]
    method = methods.build("mad_opd", {"opening": "{prompt}", "reply": "{prompt}{debate}", "reads": "{prompt}{debate}"})
    lm = LocalTeacher(lm=lms["x"], micro_batch_tokens=40, student_device=student.device)
    other = LocalTeacher(lm=lms["y"], micro_batch_tokens=40, student_device=student.device)
    undebated = replace(method, context=lambda found: [r.prompt for r in found])
    batch = batch_of(undebated, student, MixedTeacher(teachers={"x": lm, "y": other}, mixture="geometric"), rollouts)
    memory = method.make_memory()["debate"]
    assert memory.observe(batch, lambda own: [own, own]) == pytest.approx(
        {
            "debate/confidence": (40 + 60 + 80 + 90) / 4,
            "debate/missing_confidence": 4,
            "debate/no_answer": 4,
            "debate/unfinished": 2,
            "debate/left_out": 2,
            "debate/largest_weight": (1 / (1 + math.exp(-0.2)) + 0.5) / 2,
        }
    )
    assert memory.state_dict() == {}


def test_debate_longer_than_positions_is_refused_with_both_numbers():
    student, lms = cast()
    rules = replace(SHORT, rounds=2, turn="{text}" + "a" * 300)
    with pytest.raises(DataError, match=r"tokens in all, but has only 256 positions"):
        debate.held(rules, prompts(1), writers(student, lms).authors, (0, 0))


# --- runs -----------------------------------------------------------------------------------------------------------


def model(seed: int) -> Any:
    return load_model(ModelSpec(**tiny_model(seed)), name="tiny").model


def run(folder: Path, steps: int = 3, stage: Any = None, **options: Any) -> opd.Run:
    return opd.distill(
        student=model(2),
        teacher={"x": model(1), "y": model(3)},
        tokenizer=character_tokenizer(CHARACTERS),
        prompts=sums(0, 6),
        method="mad_opd",
        options={**TEXTS, "tag": r"1(\d)", **options},
        sampling={"n": 2, "max_completion_length": 4},
        teacher_sampling={"max_completion_length": 5, "temperature": 0.7},
        prompts_per_step=3,
        steps=steps,
        output_dir=folder,
        quiet=True,
        **(stage or {}),
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_run_trains_counts_and_keeps_transcripts(tmp_path: Path, beta: float):
    done = run(tmp_path / "run", beta=beta)
    rows = [row for row in done.metrics if "train/loss" in row]
    assert len(rows) == 3
    assert all(math.isfinite(row["train/loss"]) and row["debate/missing_confidence"] >= 0 for row in rows)
    lines = (tmp_path / "run/distill/texts/texts-0.jsonl").read_text().splitlines()
    said = [(row["author"], row["step"]) for row in map(json.loads, lines)]
    assert said == [(name, step) for step in range(3) for _ in range(2) for name in ("x", "y")]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_run_compares_student_with_the_mean(tmp_path: Path, beta: float):
    rows = tmp_path / "held_out.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sums(6, 3)))
    evaluate = {"data": {"path": str(rows)}, "sampling": {"sampled": {"max_completion_length": 4}}, "kl": True}
    stage = {"evaluate": evaluate, "diagnostics": {"every": 1, "k": 4}, "samples_every": 1}
    done = run(tmp_path / "run", 2, stage, beta=beta)
    (end,) = [row for row in done.metrics if row["step"] == 2 and "eval/reverse_kl" in row]
    assert end["eval/reverse_kl"] > 0
    assert all(row["compare/reverse_kl"] > 0 for row in done.metrics if "train/loss" in row)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"method": "reverse_kl", "options": {}},
            r"teacher is 'x\+y', and method 'reverse_kl' takes one teacher of a r",
        ),
        ({"evaluate": {"data": {"path": "x"}, "teacher": True}}, r"'x\+y' are several, which write none in common"),
        ({"teacher": {"student": 1}}, r"named 'student'"),
        ({"teacher": {}}, r"needs a teacher model"),
    ],
)
def test_distill_refuses_several_teachers_where_one_is_meant(tmp_path: Path, changed: dict[str, Any], message: str):
    settings: dict[str, Any] = {
        "teacher": {"x": model(1), "y": model(3)},
        "method": "mad_opd",
        "options": {},
        **changed,
    }
    with pytest.raises(ConfigError, match=message):
        opd.distill(
            student=model(2),
            tokenizer=character_tokenizer(CHARACTERS),
            prompts=sums(0, 6),
            steps=1,
            output_dir=tmp_path / "run",
            quiet=True,
            **settings,
        )
