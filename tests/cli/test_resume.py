"""A run that is stopped, in any way and anywhere, and started again is the run that was not stopped, byte for byte."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from support.runs import (
    ENVIRONMENT,
    EVALUATE,
    Forks,
    Strike,
    assert_same,
    command,
    forbid,
    left,
    one_stage,
    owner_of,
    prepare,
    self_taught,
    start,
    tiny_model,
    two_stages,
)

from opd import parallel
from opd.errors import TrainingError
from opd.stage import checkpoint
from opd.stage.interrupt import Interrupt
from opd.stage.kept_responses import KeptResponses

TRAIN = ("train", "recipe.yaml")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `two_stages`, run to its end by the command, in a process of its own."""
    folder = prepare(tmp_path_factory.mktemp("uninterrupted") / "work", two_stages())
    ended = start(folder, *TRAIN)
    assert ended.code == 0, ended.err
    return folder


def kill(call: str, nth: int = 1, when: str = "before", like: str = "", then: str = "") -> Any:
    """A kill, and the line that the second start has to show: going on from there, or nothing to go on from."""
    name = (
        f"{when} {call.removeprefix('opd.')}" + (f" of {like}" if like else "") + (f", call {nth}" if nth > 1 else "")
    )
    return pytest.param(Strike(call=call, nth=nth, when=when, like=like), then, id=name)


# Stage `teach` has 4 steps, `distil` 8; checkpoints after every second one, evaluations of `distil` after every third.
KILLS = [
    kill("opd.loss.step.loss_of", 2, then="teach: 4 steps"),
    kill("opd.loss.step.loss_of", 4, then="teach: continuing after step 2 of 4"),
    kill("opd.runs.export.saving.save", 1, "after", then="teach: continuing after step 4 of 4"),
    kill("opd.stage.folder.StageDir.mark_done", 1, then="teach: continuing after step 4 of 4"),
    kill("opd.runs.build.teacher_by_rule", 2, then="teach: already done\ndistil: 8 steps"),
    kill("opd.stage.exams.exact_divergence", 1, then="distil: after step 0"),
    kill("opd.loss.step.loss_of", 5, then="distil: after step 0"),
    kill("opd.stage.exams.measure", 3, then="distil: continuing after step 2 of 8"),
    kill("opd.stage.exams.exact_divergence", 2, then="distil: continuing after step 2 of 8"),
    kill("opd.files.os.write", 1, "half", '"step": 5', then="distil: continuing after step 4 of 8"),
    kill("opd.stage.folder.StageDir.append_timings", 9, then="distil: continuing after step 4 of 8"),
    kill("pyarrow.parquet.write_table", 2, "after", "distil/samples", then="distil: continuing after step 2 of 8"),
    kill("opd.runs.export.saving.save", 2, then="distil: continuing after step 8 of 8"),
    kill("opd.stage.folder.StageDir.mark_done", 2, then="distil: continuing after step 8 of 8"),
]
WRITING_A_CHECKPOINT = [
    kill("opd.stage.checkpoint.write_tensors", 1, "half", "distil", then="distil: after step 0"),
    kill("opd.stage.checkpoint.write_tensors", 2, "half", "distil", then="distil: continuing after step 2 of 8"),
    kill("safetensors.torch.save", 8, then="distil: after step 0"),  # the second group of its first checkpoint
    kill("opd.stage.checkpoint.write_tensors", 2, "after", "distil", then="distil: continuing after step 2 of 8"),
    kill("opd.stage.checkpoint.fsync_path", 2, "after", "distil/checkpoints", then="distil: after step 0"),
    kill(
        "opd.stage.checkpoint.fsync_path",
        3,
        "after",
        "distil/checkpoints",
        then="distil: continuing after step 2 of 8",
    ),
    kill(
        "opd.stage.checkpoint.os.rename",
        3,
        "before",
        "distil/checkpoints",
        then="distil: continuing after step 4 of 8",
    ),
    kill(
        "opd.stage.checkpoint.os.rename",
        3,
        "after",
        "distil/checkpoints",
        then="distil: continuing after step 6 of 8",
    ),
    kill(
        "opd.stage.checkpoint.os.rename",
        4,
        "after",
        "distil/checkpoints",
        then="distil: continuing after step 6 of 8",
    ),
    kill(
        "opd.stage.checkpoint.shutil.rmtree",
        4,
        "before",
        "distil/checkpoints",
        then="distil: continuing after step 6 of 8",
    ),
]


@pytest.mark.parametrize(("strike", "then"), [*KILLS, *WRITING_A_CHECKPOINT])
def test_resume_gives_equal_run_when_killed(
    tmp_path: Path, forks: Forks, uninterrupted: Path, strike: Strike, then: str
):
    folder = prepare(tmp_path / "work", two_stages())
    assert forks.start(folder, *TRAIN, strike=strike).code == -signal.SIGKILL
    done = folder / "run/teach/done.json"
    before = done.stat().st_mtime_ns if done.exists() else None

    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert then in again.out
    assert_same(folder / "run", uninterrupted / "run")
    if before is not None:
        assert "teach: already done" in again.out
        assert done.stat().st_mtime_ns == before


def test_resume_gives_equal_run_when_killed_repeatedly(tmp_path: Path, forks: Forks, uninterrupted: Path):
    folder = prepare(tmp_path / "work", two_stages())
    for nth in (3, 5, 3, 3):
        assert forks.start(folder, *TRAIN, strike=Strike(call="opd.loss.step.loss_of", nth=nth)).code == -signal.SIGKILL
    again = start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert "distil: continuing after step 6 of 8" in again.out
    assert_same(folder / "run", uninterrupted / "run")


REMEMBERING: dict[str, dict[str, Any]] = {
    "eff_opd": {"method": "eff_opd", "options": {"validate_by": "teacher_kl", "prompts": 3}},
    "anti_sd": {
        "method": "anti_sd",
        "options": {"template": "{privileged_context}{prompt}", "warm_up": 2},
        "teacher": None,
        "reward": {"name": "final_number"},
        "sampling": {"max_completion_length": 3, "n": 2},
    },
    "visd": {
        "method": "visd",
        "options": {"template": "{privileged_context}{prompt}", "hint": "privileged_context", "k": 4, "fades": 6},
        "teacher": None,
        "reward": {"name": "final_number"},
        "sampling": {"max_completion_length": 3, "n": 2},
    },
    "anti_sd released": {
        "method": "anti_sd",
        "options": {"template": "{privileged_context}{prompt}", "form": "released", "solution": "answer", "warm_up": 4},
        "teacher": None,
        "reward": {"name": "final_number"},
        "sampling": {"max_completion_length": 3, "n": 2},
    },
    "prune_opd": {
        "method": "prune_opd",
        "options": {"k": 4, "drop": 0.4, "budget": 6, "budget_min": 2, "budget_max": 8, "budget_step": 1, "margin": 1},
        "sampling": {"max_completion_length": 8},
    },
}


HINTED = {"template": "{privileged_context}{prompt}"}
REWARDED = {"reward": {"name": "final_number"}, "sampling": {"max_completion_length": 3, "n": 2}}
PRESETS: dict[str, dict[str, Any]] = {
    "sdpo": {
        "options": {**HINTED, "k": 4, "decay": 0.7, "otherwise": "privileged_context"},
        "teacher": None,
        **REWARDED,
    },
    "sdft": {"options": {**HINTED, "decay": 0.7}, "teacher": None},
    "opsd": {"options": {**HINTED, "clip": 0.05}, "teacher": None},
    "mopd": {"options": {"reward": 0.5}, **REWARDED},
    "top_d": {"sampling": {"max_completion_length": 3, "n": 2}},
    "topk_forward_kl": {"options": {"k": 4}},
}


@pytest.mark.parametrize("name", PRESETS)
def test_resume_gives_equal_run_of_preset(tmp_path: Path, forks: Forks, name: str):
    recipe = one_stage(steps=6, checkpoint={"every": 2}, method=name, **PRESETS[name])
    whole = prepare(tmp_path / "whole", recipe)
    assert forks.start(whole, *TRAIN).code == 0
    folder = prepare(tmp_path / "killed", recipe)
    assert forks.start(folder, *TRAIN, strike=Strike(call="opd.loss.step.loss_of", nth=4)).code == -signal.SIGKILL
    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert "distil: continuing after step 2 of 6" in again.out
    assert_same(folder / "run", whole / "run")


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 2}}], ids=["full weights", "lora"])
def test_resume_restores_ema_teacher(tmp_path: Path, forks: Forks, model: dict[str, Any]):
    whole = prepare(tmp_path / "whole", self_taught(**model))
    assert forks.start(whole, *TRAIN).code == 0

    folder = prepare(tmp_path / "killed", self_taught(**model))
    assert forks.start(folder, *TRAIN, strike=Strike(call="opd.loss.step.loss_of", nth=4)).code == -signal.SIGKILL
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    assert forks.start(folder, *TRAIN).code == 0
    assert_same(folder / "run", whole / "run")

    # The comparison can tell: from another average the same steps give other numbers.
    saved = spoilt / "run/self/checkpoints/step_000002"
    loaded = checkpoint.load(saved)
    student, teacher = loaded.tensors["student"], loaded.tensors["teacher"]
    assert any(not teacher[name].equal(student[name]) for name in student)
    checkpoint.save(saved.parent, 2, tensors=loaded.tensors | {"teacher": student}, state=loaded.state)
    assert forks.start(spoilt, *TRAIN).code == 0
    assert left(spoilt / "run")["self/metrics.jsonl"] != left(whole / "run")["self/metrics.jsonl"]


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 2}}], ids=["full weights", "lora"])
def test_resume_finds_debates_of_killed_steps(tmp_path: Path, forks: Forks, model: dict[str, Any]):
    """Transcripts are read again, not held again: the file of texts has each call once."""
    texts = {"opening": "{prompt}", "reply": "{prompt}+{debate}", "reads": "{prompt}={debate}", "turn": "{text}"}
    recipe = one_stage(
        method="mad_opd",
        options=texts | {"tag": r"1(\d)"},
        teacher="teacher+other",
        steps=8,
        checkpoint={"every": 3},
    )
    recipe["models"]["other"] = tiny_model(3, hidden_size=24)
    recipe["models"]["student"] |= model
    whole = prepare(tmp_path / "whole", recipe)
    assert forks.start(whole, *TRAIN).code == 0
    folder = prepare(tmp_path / "killed", recipe)
    assert forks.start(folder, *TRAIN, strike=Strike(call="opd.loss.step.loss_of", nth=6)).code == -signal.SIGKILL
    kept = (folder / "run/distil/texts/texts-0.jsonl").read_bytes()
    assert forks.start(folder, *TRAIN).code == 0
    assert_same(folder / "run", whole / "run")
    now = (folder / "run/distil/texts/texts-0.jsonl").read_bytes()
    assert now.startswith(kept)
    assert len(now.splitlines()) == 8 * 2 * 2


@pytest.mark.parametrize("stage", REMEMBERING.values(), ids=REMEMBERING)
def test_resume_restores_method_memory(tmp_path: Path, forks: Forks, stage: dict[str, Any]):
    recipe = one_stage(steps=8, checkpoint={"every": 3}, optimizer={"learning_rate": 3e-3}, **stage)
    whole = prepare(tmp_path / "whole", recipe)
    assert forks.start(whole, *TRAIN).code == 0

    folder = prepare(tmp_path / "killed", recipe)
    assert forks.start(folder, *TRAIN, strike=Strike(call="opd.loss.step.loss_of", nth=6)).code == -signal.SIGKILL
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    assert forks.start(folder, *TRAIN).code == 0
    assert_same(folder / "run", whole / "run")

    # The comparison can tell: without its memory the method goes another way.
    saved = spoilt / "run/distil/checkpoints/step_000003"
    loaded = checkpoint.load(saved)
    assert loaded.state["method"]
    forgetful = {
        name: {key: [1.0] if isinstance(value, list) else 1 for key, value in state.items()}
        for name, state in loaded.state["method"].items()
    }
    checkpoint.save(saved.parent, 3, tensors=loaded.tensors, state=loaded.state | {"method": forgetful})
    assert forks.start(spoilt, *TRAIN).code == 0
    assert left(spoilt / "run")["distil/metrics.jsonl"] != left(whole / "run")["distil/metrics.jsonl"]


def test_resume_gives_equal_run_when_method_reads_base(tmp_path: Path, forks: Forks):
    recipe = one_stage(
        steps=6, checkpoint={"every": 2}, method="extrapolated_opd", options={"strength": 1.5}, base="base"
    )
    recipe["models"]["base"] = tiny_model(3)
    whole = prepare(tmp_path / "whole", recipe)
    assert forks.start(whole, *TRAIN).code == 0
    folder = prepare(tmp_path / "killed", recipe)
    assert forks.start(folder, *TRAIN, strike=Strike(call="opd.loss.step.loss_of", nth=4)).code == -signal.SIGKILL
    assert forks.start(folder, *TRAIN).code == 0
    assert_same(folder / "run", whole / "run")


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 2}}], ids=["full weights", "lora"])
def test_resume_reads_texts_of_the_teacher_again(tmp_path: Path, forks: Forks, model: dict[str, Any]):
    """The repeated steps take their texts from the file: a call that was made again would stand in it twice."""
    recipe = one_stage(
        steps=8,
        checkpoint={"every": 3},
        method="brts",
        options={"k": 4, "n": 2, "hint": "{answer}+{prompt}", "marker": "+"},
        reward={"name": "final_number"},
        sampling={"max_completion_length": 3, "n": 2},
    )
    recipe["models"]["student"] |= model
    whole = prepare(tmp_path / "whole", recipe)
    assert forks.start(whole, *TRAIN).code == 0
    folder = prepare(tmp_path / "killed", recipe)
    assert forks.start(folder, *TRAIN, strike=Strike(call="opd.loss.step.loss_of", nth=10)).code == -signal.SIGKILL
    texts = folder / "run/distil/texts/texts-0.jsonl"
    assert len(texts.read_bytes().splitlines()) == 10  # of 5 steps, plain and with the answer shown
    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert "distil: continuing after step 3 of 8" in again.out
    assert len(texts.read_bytes().splitlines()) == 16
    assert_same(folder / "run", whole / "run")


def several_models(**model: Any) -> dict[str, Any]:
    """Two models that teach each other, each with an evaluation; one starts alone."""
    tasks = {
        name: {"train": name, "data": {"path": path}, "reward": {"name": "final_number"}, "evaluate": evaluate}
        for name, path, evaluate in (("one", "train.jsonl", EVALUATE), ("two", "held_out.jsonl", None))
    }
    made = one_stage(
        train="one",
        peers=["two"],
        teacher=None,
        data=None,
        method="copd",
        options={"alone": 1, "together": 2},
        tasks=tasks,
        task_order="mixed",
        steps=6,
        prompts_per_step=4,
        sampling={"max_completion_length": 3, "n": 2},
        optimizer={"learning_rate": 3e-3},
        checkpoint={"every": 2, "keep": 1},
        samples_every=2,
    )
    return made | {"models": {name: tiny_model(1, **model) for name in ("one", "two")}}


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 2}}], ids=["full weights", "lora"])
def test_resume_continues_all_models_of_a_stage(tmp_path: Path, forks: Forks, model: dict[str, Any]):
    """Killed between the two models' gradients, updates, logs and evaluations, and in a checkpoint of both."""
    whole = prepare(tmp_path / "whole", several_models(**model))
    first = forks.start(whole, *TRAIN)
    assert first.code == 0, first.err
    folder = prepare(tmp_path / "killed", several_models(**model))
    strikes = [
        Strike(call="opd.loss.step.loss_of", nth=8),
        Strike(call="opd.stage.folder.StageDir.append_metrics", nth=3, when="after"),
        Strike(call="opd.stage.exams.measure", nth=1),
        Strike(call="opd.stage.checkpoint.write_tensors", nth=1, when="half"),
        Strike(call="opd.stage.folder.StageDir.append_timings", nth=4),
        Strike(call="opd.runs.export.saving.save", nth=1),
    ]
    for strike in strikes:
        stopped = forks.start(folder, *TRAIN, strike=strike)
        assert stopped.code == -signal.SIGKILL, stopped.err
    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert "distil: continuing after step 6 of 6" in again.out
    assert_same(folder / "run", whole / "run")


# --- signals ---------------------------------------------------------------------------------------------------------


def interrupt(call: str, nth: int, *signals: str) -> Strike:
    return Strike(call=call, nth=nth, when="after", signals=signals or ("SIGINT",))


CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.parametrize(
    ("signals", "call", "nth"),
    [
        (("SIGINT",), "opd.loss.step.loss_of", 7),
        (("SIGTERM",), "opd.loss.step.loss_of", 7),
        (("SIGHUP",), "opd.loss.step.loss_of", 7),
        (("SIGTERM", "SIGTERM"), "opd.loss.step.loss_of", 7),
        (("SIGINT",), "opd.stage.exams.measure", 3),
        (("SIGTERM",), "opd.stage.exams.measure", 3),
    ],
)
def test_signal_saves_checkpoint_of_last_step(
    tmp_path: Path, forks: Forks, uninterrupted: Path, signals: tuple[str, ...], call: str, nth: int
):
    folder = prepare(tmp_path / "work", two_stages())
    stopped = forks.start(folder, *TRAIN, strike=interrupt(call, nth, *signals))
    assert stopped.code == CODES[signals[0]]
    hint = "; press Ctrl-C again to stop at once" if signals[0] == "SIGINT" else ""
    said = stopped.out.count(f"{signals[0]}: Stopping after this step{hint}.")
    assert said == (call == "opd.loss.step.loss_of")  # an evaluation stops at once
    assert "Stopped after step 3 of 8 of stage 'distil'; everything is saved." in stopped.err
    assert "The same command continues from there." in stopped.err
    assert "Traceback" not in stopped.err
    saved = checkpoint.latest(folder / "run/distil/checkpoints")
    assert saved is not None
    assert checkpoint.load(saved).step == 3

    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert "distil: continuing after step 3 of 8" in again.out
    assert_same(folder / "run", uninterrupted / "run")


def test_sigint_stops_immediately_when_sent_twice(tmp_path: Path, forks: Forks, uninterrupted: Path):
    folder = prepare(tmp_path / "work", two_stages())
    stopped = forks.start(folder, *TRAIN, strike=interrupt("opd.loss.step.loss_of", 7, "SIGINT", "SIGINT"))
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    saved = checkpoint.latest(folder / "run/distil/checkpoints")
    assert saved is not None
    assert checkpoint.load(saved).step == 2
    assert forks.start(folder, *TRAIN).code == 0
    assert_same(folder / "run", uninterrupted / "run")


def test_sigint_starts_no_next_stage_when_sent_in_last_step(tmp_path: Path, forks: Forks, uninterrupted: Path):
    folder = prepare(tmp_path / "work", two_stages())
    stopped = forks.start(folder, *TRAIN, strike=interrupt("opd.loss.step.loss_of", 4))
    assert "Stopping after this step" in stopped.out
    assert not (folder / "run/distil/metrics.jsonl").exists(), "the next stage was started"
    assert stopped.code == 130
    assert "The same command continues" in stopped.err
    assert forks.start(folder, *TRAIN).code == 0
    assert_same(folder / "run", uninterrupted / "run")


@pytest.mark.parametrize(
    "strike",
    [interrupt("opd.runs.build.load_model", 2), interrupt("opd.stage.exams.measure", 2)],
    ids=["while a model is loaded", "in the evaluation before training"],
)
def test_sigint_prints_resume_hint_when_outside_steps(
    tmp_path: Path, forks: Forks, uninterrupted: Path, strike: Strike
):
    folder = prepare(tmp_path / "work", two_stages())
    stopped = forks.start(folder, *TRAIN, strike=strike)
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert "The same command continues" in stopped.err
    assert forks.start(folder, *TRAIN).code == 0
    assert_same(folder / "run", uninterrupted / "run")


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as handler, handler.after_step():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not handler.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert handler.requested == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_passed_on_by_torchrun_is_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr("opd.stage.interrupt.TWICE", 600.0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    with Interrupt(alone=False) as handler, handler.after_step():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert handler.requested == signal.SIGINT


def test_train_goes_on_when_reader_of_its_output_ends(tmp_path: Path):
    folder = prepare(tmp_path / "work", one_stage())
    process = subprocess.Popen(
        [sys.executable, "-m", "opd", *TRAIN], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert (folder / "run/distil/done.json").exists()


# --- errors ----------------------------------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, call: str, nth: int, error: Exception | None = None) -> None:
    """The `nth` call raises `error`, once."""
    owner, name = owner_of(call)
    real, calls = getattr(owner, name), itertools.count(1)

    def fails(*arguments: Any, **options: Any) -> Any:
        if next(calls) == nth:
            raise error or RuntimeError("out of memory")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, fails)


@pytest.mark.parametrize(
    ("call", "nth", "done"),
    [
        ("opd.train.written", 8, 3),  # the fourth step of the second stage
        ("opd.loss.step.loss_of", 8, 3),
        ("opd.stage.exams.measure", 4, 6),  # the evaluation after the sixth step
    ],
)
def test_error_in_step_loses_no_step(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path, call: str, nth: int, done: int
):
    with monkeypatch.context() as patch:
        fail_at(patch, call, nth)
        with pytest.raises(RuntimeError, match="out of memory"):
            command(*TRAIN)
    again = command(*TRAIN)
    assert again.code == 0, again.err
    assert f"distil: continuing after step {done} of 8" in again.out
    assert_same(fresh / "run", uninterrupted / "run")


def test_error_in_update_goes_back_to_checkpoint(fresh: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path):
    with monkeypatch.context() as patch:  # the weights may have changed in part
        fail_at(patch, "opd.stage.optimisers.Optimiser.step", 8, TrainingError("out of memory"))
        stopped = command(*TRAIN)
    assert stopped.code == 1
    assert "out of memory" in stopped.err
    assert "an error while the weights were changing: the same command continues after step 2" in stopped.out
    again = command(*TRAIN)
    assert again.code == 0, again.err
    assert "distil: continuing after step 2 of 8" in again.out
    assert_same(fresh / "run", uninterrupted / "run")


def test_error_says_how_many_steps_are_lost(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    fail_at(monkeypatch, "opd.train.written", 8, TrainingError("the reward failed"))
    ended = command(*TRAIN)
    assert ended.code == 1
    assert "the reward failed" in ended.err
    assert "distil: an error after 3 steps, of which 0 are lost: the same command continues after step 3" in ended.out


@pytest.mark.parametrize("method", sorted(REMEMBERING))
def test_error_keeps_memory_of_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: Forks, method: str):
    recipe = one_stage(**REMEMBERING[method], steps=6, checkpoint={"every": 2})
    whole = prepare(tmp_path / "whole", recipe)
    assert forks.start(whole, *TRAIN).code == 0
    folder = prepare(tmp_path / "failed", recipe)
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        fail_at(patch, "opd.train.gradient", 4)  # after phase A, in which the memory learns from the step
        with pytest.raises(RuntimeError, match="out of memory"):
            command(*TRAIN)
    again = command(*TRAIN)
    assert again.code == 0, again.err
    assert "continuing after step 3 of 6" in again.out
    assert_same(folder / "run", whole / "run")


def test_checkpoint_is_written_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = prepare(
        tmp_path / "work", one_stage(steps=5, checkpoint={"every": 1000, "every_minutes": 1e-9, "keep": 9})
    )
    monkeypatch.chdir(folder)
    assert command(*TRAIN).code == 0
    written = sorted(path.name for path in (folder / "run/distil/checkpoints").iterdir())
    assert written == [f"step_{step:06d}" for step in range(1, 6)]


# --- a folder that holds a run ---------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, as the working directory."""
    folder = shutil.copytree(uninterrupted, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def modified(run: Path) -> dict[str, int]:
    files = (file for file in run.rglob("*") if file.is_file() and file.name != "environment.json")
    return {str(file): file.stat().st_mtime_ns for file in files}


def test_train_only_prints_report_when_run_is_finished(finished: Path, uninterrupted: Path):
    before = modified(finished / "run")
    again = command(*TRAIN)
    assert again.code == 0, again.err
    assert "teach: already done\ndistil: already done" in again.out
    assert "held-out prompts" in again.out
    assert "greedy: reward" in again.out
    assert 'AutoModelForCausalLM.from_pretrained("run/distil/model")' in again.out
    assert modified(finished / "run") == before
    assert_same(finished / "run", uninterrupted / "run")


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("seed=1", "  seed: 0 -> 1"),
        ("stages.distil.prompts_per_step=3", "  stages.distil.prompts_per_step: 4 -> 3"),
        ("models.student.seed=5", "  models.student.seed: 2 -> 5"),
    ],
)
def test_train_prints_changes_when_folder_has_other_recipe(
    finished: Path, override: str, change: str, uninterrupted: Path
):
    refused = command(*TRAIN, override)
    assert refused.code == 1
    assert "run holds a run with other values:" in refused.err
    assert change in refused.err.splitlines()
    assert "output_dir=..." in refused.err
    assert_same(finished / "run", uninterrupted / "run")


def test_output_dir_is_refused_when_other_files_are_there(finished: Path, no_weights: None):
    (finished / "other").mkdir()
    (finished / "other" / "thesis.tex").write_text("ten years of work")
    refused = command(*TRAIN, "output_dir=other")
    assert refused.code == 1
    assert "other is not a run directory: it holds 'thesis.tex'" in refused.err
    assert [file.name for file in (finished / "other").iterdir()] == ["thesis.tex"]


# --- nowhere to write ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    forbid(monkeypatch, "opd.runs.build.load_model")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = prepare(tmp_path / "work", two_stages())
    monkeypatch.chdir(folder)
    return folder


def test_output_dir_is_refused_when_not_writable(fresh: Path, no_weights: None):
    refused = command(*TRAIN, "output_dir=train.jsonl/run")
    assert refused.code == 1
    assert refused.err.startswith("RunError: train.jsonl/run cannot be written (Not a directory).")
    assert "output_dir=..." in refused.err


def test_output_dir_is_refused_when_path_is_a_file(fresh: Path, no_weights: None):
    refused = command(*TRAIN, "output_dir=train.jsonl")
    assert refused.code == 1
    assert refused.err.startswith("RunError: train.jsonl is a file, and a run needs a folder.")
    assert "output_dir=..." in refused.err


def test_train_raises_run_error_when_disk_space_is_low(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, (1 << 40) - 1000, 1000))
    forbid(monkeypatch, "opd.runs.stages.train")
    refused = command(*TRAIN)
    assert refused.code == 1
    assert refused.err.startswith("RunError: run has 0.00 GiB free, and this run needs about")
    assert "Free space there, use an output_dir=... on another disk" in refused.err


def test_resume_gives_equal_run_when_disk_was_full(fresh: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch):
    real, saved = parallel.write_tensors, 0

    def fills_up(*arguments: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 4:  # the second checkpoint of stage `distil`
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", fills_up)
    stopped = command(*TRAIN)
    assert stopped.code == 1
    assert "The checkpoint of step 4 could not be written" in stopped.err
    assert "No space left on device" in stopped.err
    assert "step_000002 is complete and unchanged" in stopped.err
    assert "it continues from step 2" in stopped.err
    assert "an error after 4 steps, of which 0 are lost" in stopped.out  # the second attempt found room

    again = command(*TRAIN)
    assert again.code == 0, again.err
    assert "distil: continuing after step 4 of 8" in again.out
    assert_same(fresh / "run", uninterrupted / "run")


# --- evaluations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nth", "sampled"),
    [(2, ["teacher greedy", "teacher drawn"]), (6, ["before greedy", "before drawn"])],
)
def test_stopped_evaluation_keeps_its_responses(
    tmp_path: Path, forks: Forks, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, nth: int, sampled: list[str]
):
    folder = prepare(tmp_path / "work", two_stages())
    strike = interrupt("opd.stage.kept_responses.KeptResponses.write", nth, "SIGTERM")
    stopped = forks.start(folder, *TRAIN, strike=strike)
    assert stopped.code == 143
    kept = sorted(file.name for file in (folder / "run/distil/evaluating").iterdir())
    assert len(kept) == {2: 2, 6: 2}[nth]
    monkeypatch.chdir(folder)
    calls: list[str] = []
    real = KeptResponses.write

    def counted(self: KeptResponses, name: str, rollouts: Any) -> None:
        calls.append(name)
        real(self, name, rollouts)

    monkeypatch.setattr(KeptResponses, "write", counted)
    again = command(*TRAIN)
    assert again.code == 0, again.err
    assert not set(kept) & {f"{name}.json" for name in calls}
    assert_same(folder / "run", uninterrupted / "run")


def test_kept_responses_of_other_weights_are_removed(
    tmp_path: Path, forks: Forks, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = prepare(tmp_path / "work", two_stages())
    killed = Strike(call="opd.stage.exams.exact_divergence", nth=2)  # after step 3; the checkpoint is of step 2
    assert forks.start(folder, *TRAIN, strike=killed).code == -signal.SIGKILL
    kept = folder / "run/distil/evaluating"
    assert sorted(file.name for file in kept.iterdir()) == ["step_000003..0.json", "step_000003..1.json"]
    for file in kept.iterdir():
        file.write_text("[]")
    again = forks.start(folder, *TRAIN)
    assert again.code == 0, again.err
    assert_same(folder / "run", uninterrupted / "run")
