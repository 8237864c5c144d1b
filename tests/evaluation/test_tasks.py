"""Tasks of lm-eval on local data: what its metrics get, against transformers' own forward pass and generation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.models import build, byte_tokenizer
from support.runs import command

from opd.errors import ConfigError, DataError
from opd.evaluation import tasks as tasks_file
from opd.evaluation.tasks import Tasks, load_tasks, run_tasks
from opd.maths.intervals import SHARE, mean_interval
from opd.maths.statistics import pass_at_k
from opd.models import wrapping
from opd.models.language_model import LanguageModel
from opd.types import Sampling

QUESTIONS = ("ab", "cd", "ef", "gh")


def needs_lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="the extra opd[tasks] is not installed")


@pytest.fixture
def lm() -> LanguageModel:
    tokenizer = byte_tokenizer()
    return wrapping.wrap(build(tokenizer=tokenizer), tokenizer, name="tiny")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three tasks with their data, and a cache of data sets of the test's own."""
    needs_lm_eval()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": one, "answer": "x" if i else "ab", "right": i % 2} for i, one in enumerate(QUESTIONS)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "test_split": "test"}
    common["dataset_kwargs"] = {"data_files": {"test": str(data / "test.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    asked = {"until": ["\n", "A"], "max_gen_toks": 5}
    mean = {"aggregation": "mean", "higher_is_better": True}
    made: dict[str, dict[str, Any]] = {
        "spoken": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": asked,
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "chosen": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": ["yes", "no!"],
            "doc_to_target": "right",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, task in made.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return tmp_path


def results_of(lm: LanguageModel, tasks: Tasks, seed: int = 0, **override: Any) -> Any:
    from opd.evaluation.harness import HarnessModel, Override

    model = HarnessModel(lm, Override(**override), seed, tokens=64)
    return run_tasks(tasks, load_tasks(tasks), model)


def logp_of(lm: LanguageModel, before: str, after: str) -> float:
    """By transformers' own forward pass over the whole text; without a context after the end token."""
    tokenizer = lm.tokenizer
    first = tokenizer(before).input_ids or [tokenizer.eos_token_id]
    ids = torch.tensor([[*first, *tokenizer(after).input_ids]])
    with torch.no_grad():
        logp = lm.model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(logp[i - 1, ids[0, i]].item() for i in range(len(first), ids.shape[1]))


def test_multiple_choice_scores_equal_transformers(lm: LanguageModel, folder: Path):
    found = results_of(lm, Tasks(names=[str(folder / "chosen.yaml")]))
    right: list[float] = []
    for i, question in enumerate(QUESTIONS):
        scores = [logp_of(lm, question, f" {choice}") for choice in ("yes", "no!")]
        right.append(float(scores.index(max(scores)) == i % 2))
        row = found.rows[i]
        assert [one[0] for one in row["response"]] == pytest.approx(scores, abs=1e-4)
        assert row["metrics"] == {"acc": right[-1]}
    assert {name: found.metrics[f"chosen/{name}"] for name in ("acc", "acc_low", "acc_high")} == pytest.approx(
        mean_interval(right, SHARE).numbers("acc")
    )
    assert found.metrics["chosen/prompts"] == 4


def test_rolling_perplexity_equals_transformers(lm: LanguageModel, folder: Path):
    """lm-eval's own aggregate, which is no mean of numbers: without an interval."""
    found = results_of(lm, Tasks(names=[str(folder / "read.yaml")]))
    total = sum(logp_of(lm, "", question) for question in QUESTIONS)
    assert found.metrics["read/byte_perplexity"] == pytest.approx(math.exp(-total / 8), rel=1e-4)
    assert "read/byte_perplexity_low" not in found.metrics


def test_greedy_responses_equal_transformers_generation(lm: LanguageModel, folder: Path):
    found = results_of(lm, Tasks(names=[str(folder / "spoken.yaml")]))
    for row, question in zip(found.rows, QUESTIONS, strict=True):
        ids = torch.tensor([lm.tokenizer(question).input_ids])
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        text = lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["response"] == [text.split("\n")[0].split("A")[0]]
    assert found.metrics["spoken/length"] <= 5


def test_samples_have_pass_at_k_with_intervals(lm: LanguageModel, folder: Path):
    name = str(folder / "spoken.yaml")
    found = results_of(lm, Tasks(names=[name]), n=4, temperature=1.0)
    assert [(row["prompt_id"], row["sample"]) for row in found.rows] == [(i, s) for s in range(4) for i in range(4)]
    assert len({tuple(row["response"]) for row in found.rows}) > 4
    for row in found.rows:
        assert row["metrics"]["exact_match"] == float(row["response"] == [row["target"]])
    right = [sum(row["metrics"]["exact_match"] for row in found.rows if row["prompt_id"] == i) for i in range(4)]
    for k in (2, 4):
        expected = mean_interval([pass_at_k(4, int(count), k) for count in right], SHARE).numbers(
            f"exact_match/pass@{k}"
        )
        assert {one: found.metrics[f"spoken/{one}"] for one in expected} == pytest.approx(expected)
    assert found.metrics["spoken/responses"] == 16
    again = results_of(lm, Tasks(names=[name]), n=4, temperature=1.0)
    assert again.rows == found.rows
    assert results_of(lm, Tasks(names=[name]), seed=1, n=4, temperature=1.0).rows != found.rows


def test_chat_prompts_are_read_through_the_template(lm: LanguageModel, folder: Path):
    found = results_of(lm, Tasks(names=[str(folder / "spoken.yaml")], chat=True, limit=2))
    assert found.rows[0]["prompt"] == ["<user>ab<assistant>"]
    ids = torch.tensor([lm.tokenizer("<user>ab<assistant>", add_special_tokens=False).input_ids])
    out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    text = lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.rows[0]["response"] == [text.split("\n")[0].split("A")[0]]
    assert len(found.rows) == 2


def test_override_takes_task_settings_unless_given():
    needs_lm_eval()
    from opd.evaluation.harness import Override, cut

    asked = {"until": "Q", "max_gen_toks": 9, "temperature": 0.5, "do_sample": True, "top_p": 0.9, "top_k": 3}
    assert Override().sampling("t", asked) == Sampling(
        max_completion_length=9, temperature=0.5, top_p=0.9, top_k=3, stop=("Q",)
    )
    assert Override().sampling("t", {}).temperature == 0.0
    assert Override().sampling("t", {"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert Override().sampling("t", {"do_sample": True}).temperature == 1.0
    given = Override(n=2, temperature=0.7, top_p=1.0, max_completion_length=3).sampling("t", asked)
    assert given == Sampling(n=2, max_completion_length=3, temperature=0.7, stop=("Q",))
    with pytest.raises(ConfigError, match=r"Task t is answered greedily .* the 2 responses .*Give --temperature too"):
        Override(n=2).sampling("t", {})
    assert cut("abQcRd", ["R", "Q"]) == "ab"


def test_load_tasks_reads_data_of_local_folder(folder: Path):
    """A task of a folder of tasks, with other data than its own."""
    other = folder / "other"
    other.mkdir()
    (other / "test.jsonl").write_text(json.dumps({"question": "zz", "answer": "y", "right": 0}) + "\n")
    library = folder / "library"
    library.mkdir()
    task = yaml.safe_load((folder / "spoken.yaml").read_text())
    del task["dataset_kwargs"]
    (library / "spoken.yaml").write_text(yaml.safe_dump({**task, "dataset_path": "no/such_data"}))
    (one,) = load_tasks(Tasks(names=[f"spoken={other}"], folder=str(library))).tasks.values()
    assert [doc["question"] for doc in one.test_docs()] == ["zz"]
    with pytest.raises(DataError, match=r"Task spoken of lm-eval cannot be loaded .*--tasks spoken=FOLDER"):
        load_tasks(Tasks(names=["spoken"], folder=str(library)))


def test_load_tasks_sets_number_of_examples(folder: Path):
    task = yaml.safe_load((folder / "spoken.yaml").read_text())
    (folder / "none.yaml").write_text(yaml.safe_dump({**task, "task": "none", "num_fewshot": 0}))
    for fewshot, expected in ((None, 0), (2, 2)):
        (one,) = load_tasks(Tasks(names=[str(folder / "spoken.yaml")], fewshot=fewshot)).tasks.values()
        assert one.get_config("num_fewshot") == expected
    with pytest.raises(ConfigError, match=r"Task none is one without examples .* --fewshot is 2. Measure it alone"):
        load_tasks(Tasks(names=[str(folder / "none.yaml")], fewshot=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["gsm8"]}, r"lm-eval has no task 'gsm8'. Did you mean 'gsm8k'\?"),
        ({"names": ["gsm8k=nowhere"]}, r"--tasks gsm8k=nowhere: nowhere is no folder"),
        ({"names": ["gsm8k"], "folder": "nowhere"}, r"--task-folder nowhere is no folder"),
        ({"names": ["gsm8k"], "limit": 0}, r"--limit 0 leaves no prompt"),
    ],
)
def test_load_tasks_refuses_names_and_folders(settings: dict[str, Any], message: str):
    needs_lm_eval()
    with pytest.raises(ConfigError, match=message):
        load_tasks(Tasks(**settings))


def test_require_names_extra_when_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"lm-eval, which is not installed .*`pip install 'opd\[tasks\]'`"):
        tasks_file.require()


def test_eval_command_writes_tasks_and_own_rewards(lm: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch):
    from opd.models import saving

    monkeypatch.chdir(folder)
    saving.save(lm, folder / "model")
    Path("held_out.jsonl").write_text(json.dumps({"prompt": "ab", "answer": "x"}) + "\n")
    ask = ("eval", "model", "held_out.jsonl", "--reward", "exact", "--tasks", "spoken.yaml,chosen.yaml")
    ended = command(*ask, "--max-completion-length", "3", "--json", "--responses", "responses.jsonl")
    assert ended.code == 0, ended.err
    metrics = json.loads(ended.out)["metrics"]
    assert metrics["reward"] in (0.0, 1.0)
    assert 0 <= metrics["chosen/acc_low"] <= metrics["chosen/acc"] <= metrics["chosen/acc_high"] <= 1
    assert metrics["spoken/length"] <= 3
    rows = [json.loads(line) for line in Path("responses.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == [None, *["spoken"] * 4, *["chosen"] * 4]
    assert rows[0]["metrics"] == {"reward": metrics["reward"]}
