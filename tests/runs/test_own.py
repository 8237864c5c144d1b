"""A user's own teacher and sampler: named in a recipe, given in Python, and what an object that is none is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.models import prompts_of, tiny
from support.runs import Forks, one_stage, prepare

import opd
from opd.commands.doctor.examine import examine
from opd.errors import ConfigError, RunError
from opd.models.language_model import LanguageModel
from opd.samplers.hf import TransformersSampler
from opd.types import NOTHING_MORE, EarlyStop, Prompt, Record, Reward, Rollout, Sampler, Sampling, ScoreRequest, Scores

MINE = '''
import torch
from opd.models.render import render
from opd.types import Scores, Teacher
from support.models import tiny


class Plain(Teacher):
    """The sampled tokens' log-probs by a forward of transformers, row by row."""

    name = "mine"

    def __init__(self, student, seed=0):
        self.model, self.tokenizer = tiny(seed=seed).model, student.tokenizer

    def refuses(self, request):
        return None if request.support.kind == "sampled" else f"it scores sampled tokens, not {request.support.kind}"

    @torch.no_grad()
    def score(self, rollouts, contexts, request):
        return [self.one(r, render(c, self.tokenizer), request.temperature) for r, c in zip(rollouts, contexts)]

    def one(self, rollout, prompt, temperature):
        row = torch.tensor([[*prompt, *rollout.response_ids.tolist()]])
        logp = (self.model(input_ids=row).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        return Scores(teacher_logp=logp.gather(1, rollout.response_ids[:, None])[:, 0])


def none(student):
    return object()
'''


class Counting(Sampler):
    """The library's sampler, with a list of the versions that it was told."""

    versions: ClassVar[list[int]] = []

    def __init__(self, student: LanguageModel, sampling: Sampling, *, limit: int = 99) -> None:
        assert sampling.max_completion_length < limit
        self.inner = TransformersSampler(lm=student, sampling=sampling)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        return self.inner(prompts, seed=seed, record=record, stop=stop)

    def sync(self, version: int) -> None:
        self.versions.append(version)
        self.inner.sync(version)


class NoSync:
    """A sampler that lacks `sync` and `temperature`."""

    def __init__(self, student: LanguageModel, sampling: Sampling) -> None:
        pass

    def __call__(self, prompts: Sequence[Prompt], **options: Any) -> list[Rollout]:
        return []


class Mute:
    """A teacher that has `score` alone."""

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        return []


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_teacher.py").write_text(MINE)
    return tmp_path


def distill(**changes: Any) -> opd.Run:
    student = tiny()
    arguments: dict[str, Any] = {
        "student": student.model,
        "tokenizer": student.tokenizer,
        "prompts": prompts_of("ab", "cde"),
        "method": "opd",
        "steps": 3,
        "sampling": {"max_completion_length": 6},
        "quiet": True,
        "samples_every": 0,
    }
    return opd.distill(**{**arguments, **changes})


def losses(run: opd.Run) -> list[float]:
    return [row["train/loss"] for row in run.metrics]


def built_in() -> list[float]:
    teacher = tiny(seed=4)
    return losses(distill(teacher=teacher.model, teacher_tokenizer=teacher.tokenizer))


def test_own_teacher_gives_losses_of_local_teacher_when_named():
    named = distill(teacher="my_teacher:Plain")
    assert losses(named) != built_in()
    recipe = named.recipe.model_dump(mode="json")
    recipe["models"]["teacher"]["options"] = {"seed": 4}
    recipe["models"]["student"] = {"path": "start"}
    tiny().model.save_pretrained("start")
    tiny().tokenizer.save_pretrained("start")
    recipe["stages"][0]["data"] = {"path": "rows.jsonl"}
    Path("rows.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cde"}\n')
    again = opd.run({**recipe, "output_dir": "again"}, quiet=True)
    assert losses(again) == pytest.approx(built_in(), abs=1e-5)


def test_own_teacher_gives_losses_of_local_teacher_when_object(work: Path):
    import importlib

    plain = importlib.import_module("my_teacher").Plain(tiny(), seed=4)
    assert losses(distill(teacher=plain)) == pytest.approx(built_in(), abs=1e-5)


def test_own_teacher_raises_config_error_when_refuses_is_given():
    with pytest.raises(
        ConfigError, match=r"'mine' cannot score method 'reverse_kl': it scores sampled tokens, not full"
    ):
        distill(teacher="my_teacher:Plain", method="reverse_kl")


def test_own_teacher_raises_config_error_when_no_teacher():
    with pytest.raises(
        ConfigError, match=r"scorer my_teacher:none returned a object, not a Teacher: it lacks after_step"
    ):
        distill(teacher="my_teacher:none")
    with pytest.raises(ConfigError, match=r"returned a Mute, not a Teacher: it lacks after_step, .*Derive its class"):
        distill(teacher=Mute())
    with pytest.raises(ConfigError, match=r"my_teacher:Nobody: 'Nobody' does not exist"):
        distill(teacher="my_teacher:Nobody")


def test_own_teacher_is_refused_by_evaluate_kl_when_it_has_no_distribution():
    """Also beside a method without a teacher: the number is not left out in silence."""
    rows = [{"prompt": "ab", "response": "c"}]
    evaluate = {"data": {"path": "rows.jsonl"}, "sampling": {"greedy": {"max_completion_length": 4}}, "kl": True}
    Path("rows.jsonl").write_text('{"prompt": "ab"}\n')
    with pytest.raises(ConfigError, match=r"evaluate\.kl compares .* and mine does not support this: it scores"):
        distill(method="sft", prompts=rows, teacher="my_teacher:Plain", evaluate=evaluate)


def test_doctor_refuses_own_teacher():
    recipe = distill(teacher="my_teacher:Plain").recipe
    with pytest.raises(ConfigError, match="teacher 'teacher' is made by my_teacher:Plain, which only scores"):
        examine(recipe)


def test_distill_records_sampler_when_it_has_no_name():
    teacher = tiny(seed=4)
    arguments = {"teacher": teacher.model, "teacher_tokenizer": teacher.tokenizer}
    run = distill(sampler=partial(Counting, limit=50), **arguments)
    assert run.recipe.stages[0].sampler == "(partial given in Python)"
    assert losses(run) == built_in()


def test_distill_is_another_run_when_privileged_context_differs():
    def run(context: str) -> opd.Run:
        rows = [{"prompt": "ab", "privileged_context": context}]
        return distill(
            prompts=rows,
            method="context_distillation",
            options={"k": None, "template": "{privileged_context}{prompt}"},
            output_dir="same",
        )

    assert losses(run("c")) == losses(run("c"))
    with pytest.raises(RunError, match="another"):
        run("d")


class Relative(Reward):
    """The share of the group's responses that are shorter: no number of one group says anything of another."""

    name, comparable = "relative", False

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        lengths = [len(one.response_ids) for one in rollouts]
        return [
            replace(one, reward=sum(n < len(one.response_ids) for n in lengths) / len(rollouts)) for one in rollouts
        ]


def test_own_reward_is_refused_by_update_when_not_comparable():
    teacher = tiny(seed=4)
    arguments = {"teacher": teacher.model, "teacher_tokenizer": teacher.tokenizer, "reward": Relative()}
    with pytest.raises(ConfigError, match="'eff_opd' compares weights by their reward, and the reward 'relative' decl"):
        distill(method="eff_opd", **arguments)
    assert losses(distill(**arguments)) == built_in()


def test_own_sampler_is_synced_before_each_step():
    Counting.versions.clear()
    teacher = tiny(seed=4)
    run = distill(teacher=teacher.model, teacher_tokenizer=teacher.tokenizer, sampler=Counting)
    assert losses(run) == built_in()
    assert Counting.versions == [0, 1, 2]


def test_own_sampler_raises_config_error_when_no_sampler():
    teacher = tiny(seed=4)
    with pytest.raises(
        ConfigError, match=r"returned a NoSync, not a Sampler: it lacks pop_requests, sync, temperature\. Derive"
    ):
        distill(teacher=teacher.model, teacher_tokenizer=teacher.tokenizer, sampler=NoSync)


def test_own_maker_that_raises_is_named():
    Path("raising.py").write_text(
        "def teacher(student):\n    return {}['key']\n\n\ndef sampler(student, sampling):\n    raise SystemExit(3)\n"
    )
    with pytest.raises(ConfigError, match=r"scorer raising:teacher raised KeyError: 'key'\. Correct the function"):
        distill(teacher="raising:teacher")
    with pytest.raises(ConfigError, match=r"raising:sampler raised SystemExit: 3\. Correct the function or its"):
        distill(teacher="my_teacher:Plain", sampler="raising:sampler")


def test_train_goes_on_after_reward_moves_and_stops_gradients(tmp_path: Path, forks: Forks):
    """A grader that runs programs in another folder, beside a model of its own, leaves both switched."""
    recipe = one_stage(
        method="grpo", teacher=None, sampling={"n": 2, "max_completion_length": 3}, reward={"name": "mine:reward"}
    )
    del recipe["models"]["teacher"]
    folder = prepare(tmp_path / "work", recipe)
    (folder / "mine.py").write_text(
        "import os\n\nimport torch\n\ntorch.set_grad_enabled(False)\n\n\n"
        "def reward(prompt, text):\n    os.chdir('/')\n    return float(len(set(text)))\n"
    )
    ended = forks.start(folder, "train", "recipe.yaml")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (folder / "run/distil/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert any(row["optim/grad_norm"] > 0 for row in rows)
