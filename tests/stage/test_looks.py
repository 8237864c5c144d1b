"""What sample files show of both models: against the models themselves, and with no effect on the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import prompts_of, tiny
from support.runs import EVALUATE, command, one_stage, prepare, tiny_model

from opd.errors import TeacherError
from opd.samplers.hf import TransformersSampler
from opd.stage.folder import StageDir
from opd.stage.looks import columns_or_note
from opd.stage.picks import Candidate, picked
from opd.stage.progress import Progress
from opd.teachers.local import LocalTeacher
from opd.types import Sampling


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(name: str, recipe: Mapping[str, Any]) -> StageDir:
    """The folder of the last stage of a recipe that is run in a folder of that name, with the command."""
    folder = prepare(Path(name), {**recipe, "output_dir": f"{name}/run"})
    for file in ("train.jsonl", "held_out.jsonl"):
        Path(file).write_bytes((folder / file).read_bytes())
    ended = command("train", str(folder / "recipe.yaml"))
    assert ended.code == 0, ended.err
    return StageDir(folder / "run" / recipe["stages"][-1]["name"])


def step_of(stage: StageDir, step: int) -> list[dict[str, Any]]:
    return [row for row in stage.read_samples() if row["step"] == step]


METHODS_HERE: dict[str, dict[str, Any]] = {
    "reverse_kl": {"method": "reverse_kl"},
    "top k": {"method": "topk_reverse_kl", "options": {"k": 3, "form": "tail"}},
    "renormalised": {"method": "topk_reverse_kl", "options": {"k": 3, "by": "teacher"}},
    "sampled": {"method": "opd"},
    "sft": {"method": "sft", "teacher": None},
    "self": {"method": "context_distillation", "teacher": None, "options": {"template": "{answer}{prompt}", "k": 3}},
}


@pytest.mark.parametrize("name", METHODS_HERE)
def test_signal_of_rows_is_the_loss_of_the_step(name: str):
    """The mean of the rows' signals is the step's, and weighed it is the loss: one denominator of tokens here."""
    stage = trained("run", one_stage(**METHODS_HERE[name], steps=2, prompts_per_step=6, samples_every=1))
    rows, metrics = step_of(stage, 1), stage.read_metrics()[0]
    signals = [value for row in rows for value in row["signal"]]
    assert len(signals) == metrics["train/tokens"]
    assert math.fsum(signals) / len(signals) == pytest.approx(metrics["train/signal"], rel=1e-5)
    assert any(signals)


def columns_are_those_of(row: Mapping[str, Any], whose: str, seed: int) -> None:
    """Against one forward of transformers; rank by sorting all log-probs."""
    from opd.models.loading import load_model
    from opd.recipe.schema import ModelSpec

    lm = load_model(ModelSpec(**tiny_model(seed)), name=whose)
    prompt = lm.tokenizer(row["student_reads"], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *row["response_ids"]]])
    logp = lm.model(ids).logits[0, len(prompt) - 1 : -1, : lm.vocabulary].double().log_softmax(-1).detach()
    for t, token in enumerate(row["response_ids"]):
        order = logp[t].sort(descending=True)
        assert row[f"{whose}_top_ids"][t] == order.indices[:3].tolist()
        assert row[f"{whose}_top_logp"][t] == pytest.approx(order.values[:3].tolist(), abs=1e-5)
        texts = lm.tokenizer.convert_ids_to_tokens(order.indices[:3].tolist())
        assert row[f"{whose}_top_tokens"][t] == texts
        entropy = -float((logp[t].exp() * logp[t]).sum())
        assert row[f"{whose}_entropy"][t] == pytest.approx(entropy, abs=1e-5)
        if whose == "teacher":
            assert row["teacher_rank"][t] == order.indices.tolist().index(token)


def test_student_and_teacher_columns_are_those_of_the_models():
    recipe = one_stage(steps=1, prompts_per_step=6, samples={"rows": 4, "top_k": 3, "follow": 0})
    row = next(row for row in step_of(trained("run", recipe), 1) if row["pick"] == "least")
    columns_are_those_of(row, "student", 2)
    columns_are_those_of(row, "teacher", 1)


def test_followed_rows_are_the_same_prompts_scored_by_the_teacher():
    samples = {"rows": 4, "top_k": 3, "follow": 2}
    stage = trained("run", one_stage(steps=2, samples_every=1, samples=samples, evaluate=EVALUATE))
    rows = stage.read_samples(followed=True)
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    assert [row["prompt_id"] for row in rows[:2]] == [row["prompt_id"] for row in rows[2:]]
    assert {row["pick"] for row in rows} == {"follow"}
    for row in rows:
        columns_are_those_of(row, "teacher", 1)


def test_samples_change_no_byte_of_metrics_and_weights():
    """Every step written in full against none; evaluations, comparisons and a top-p sampler beside them."""
    full = {"rows": 3, "top_k": 4, "follow": 2, "held_out": 3}
    none = {"rows": 0, "top_k": 0, "follow": 0, "held_out": 0}
    stage = {
        "steps": 5,
        "prompts_per_step": 4,
        "sampling": {"max_completion_length": 4, "top_p": 0.9, "n": 2},
        "optimizer": {"learning_rate": 0.01},
        "evaluate": EVALUATE,
        "diagnostics": {"every": 2, "k": 4, "bucket": 2},
    }
    for name, more in METHODS_HERE.items():
        alone = {"evaluate": {**EVALUATE, "teacher": False, "kl": False}, "diagnostics": {}}
        evaluate = alone if name == "sft" else {}
        recipes = [
            one_stage(**{**stage, **more, **evaluate}, samples_every=every, samples=samples)
            for every, samples in ((1, full), (0, none))
        ]
        one, other = (trained(f"{name} {i}", recipe) for i, recipe in enumerate(recipes))
        assert len(list(one.samples.iterdir())) == 5
        assert not list(other.samples.iterdir())
        assert one.metrics.read_bytes() == other.metrics.read_bytes(), name
        for file in one.model.glob("*.safetensors"):
            assert file.read_bytes() == (other.model / file.name).read_bytes(), name


def test_teacher_that_is_lost_leaves_columns_of_student_and_a_note():
    class Lost(LocalTeacher):
        name = "lost"

        def score(self, *_: Any, **__: Any) -> Any:
            raise TeacherError("no server answers")

    student, notes = tiny(), list[str]()
    progress = Progress(quiet=True)
    progress.note = notes.append
    rollouts = TransformersSampler(lm=student, sampling=Sampling(max_completion_length=3))(
        prompts_of("ab", "c"), seed=(0, 0)
    )
    lost = Lost(lm=student, micro_batch_tokens=64, student_device=student.device)
    contexts = [one.prompt for one in rollouts]
    rows = columns_or_note("step 1", progress, student, lost, rollouts, contexts, k=2, micro_batch_tokens=64)
    assert notes == ["step 1: the file has no columns of lost: no server answers"]
    for row, rollout in zip(rows, rollouts, strict=True):
        assert len(row["student_top_ids"]) == len(rollout.response_ids)
        assert "teacher_top_ids" not in row


# --- the rules -------------------------------------------------------------------------------------------------------


def candidates(values: Sequence[tuple[int, float | None]]) -> list[Candidate]:
    return [Candidate((i,), length, ratio) for i, (length, ratio) in enumerate(values)]


def test_picked_takes_extremes_in_turn():
    rows = candidates([(5, -1.0), (9, 0.0), (1, -0.5), (4, -3.0), (6, 2.0), (5, -0.2)])
    found = picked(rows, 5, (0, 7))
    assert {rule: key[0] for key, rule in found.items() if rule != "chance"} == {
        "least": 3,
        "most": 4,
        "longest": 1,
        "shortest": 2,
    }
    assert next(key for key, rule in found.items() if rule == "chance")[0] in (0, 5)
    assert picked(rows, 5, (0, 7)) == picked(rows[::-1], 5, (0, 7)) == found
    assert list(picked(rows, 6, (0, 7)).values()) == ["least", "most", "longest", "shortest", "chance", "least"]
    assert len({tuple(picked(rows, 5, (0, step))) for step in range(20)}) == 2


def test_picked_needs_no_ratio_and_takes_no_row_twice():
    assert picked(candidates([(1, None)]), 8, (0, 0)) == {(0,): "longest"}
    assert list(picked(candidates([(1, None), (2, None), (3, None)]), 8, (0, 0)).values()) == [
        "longest",
        "shortest",
        "chance",
    ]
    assert picked([], 8, (0, 0)) == {}
    assert picked(candidates([(1, 0.0)]), 0, (0, 0)) == {}


@pytest.mark.parametrize("held_out", [0, 2])
def test_held_out_rows_are_scored_by_the_pass_of_the_divergence(held_out: int, monkeypatch: pytest.MonkeyPatch):
    """With `kl` its setting has the columns of all rows, without a forward of their own; the others the first rows."""
    from opd.stage import exams

    scored: list[int] = []

    def counted(
        what: str, progress: Progress, student: Any, teacher: Any, rollouts: Any, *rest: Any, **how: Any
    ) -> Any:
        scored.append(len(rollouts))
        return columns_or_note(what, progress, student, teacher, rollouts, *rest, **how)

    monkeypatch.setattr(exams, "columns_or_note", counted)
    sampling = {"greedy": {"temperature": 0, "max_completion_length": 4}, "drawn": {"max_completion_length": 4}}
    evaluate = {**EVALUATE, "sampling": sampling, "teacher": False}
    samples = {"held_out": held_out, "top_k": 3, "rows": 0, "follow": 0}
    files = {}
    for name, kl in (("with", True), ("without", False)):
        scored.clear()
        files[name] = trained(name, one_stage(steps=1, samples=samples, evaluate={**evaluate, "kl": kl}))
        assert scored == ([held_out] * (2 if kl else 4) if held_out else [])
    rows, plain = ([row for row in files[name].read_held_out("before") if row["sampling"] == "drawn"] for name in files)
    assert [row["response_ids"] for row in rows] == [row["response_ids"] for row in plain]
    assert [row["student_top_ids"] is None for row in rows] == [not held_out] * len(rows)
    assert len(rows) > 2
    for row, other in zip(rows[:held_out], plain[:held_out], strict=True):
        columns_are_those_of(row, "student", 2)
        columns_are_those_of(row, "teacher", 1)
        for column in ("signal", "policy_logp", "teacher_logp", "student_entropy", "teacher_entropy"):
            assert row[column] == pytest.approx(other[column], abs=1e-5), column
