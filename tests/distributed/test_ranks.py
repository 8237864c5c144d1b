"""Two processes are one: the same parameters, moments, metrics and responses, however prompts are divided.

Real processes under torchrun, on gloo. Several recipes share a pair of processes, which saves imports.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks, shards
from support.runs import ENVIRONMENT, EVALUATE, Ended, Forks, Strike, one_stage, prepare, tiny_model
from torch import Tensor

from opd.parallel import ALONE
from opd.stage import checkpoint

HERE = Path(__file__).parents[1] / "support"
PATH = f"{HERE}:{HERE.parent}:{ENVIRONMENT.get('PYTHONPATH', '')}"
STEPS, HALF = 10, 5
CLOSE = 2e-5
SHARE = "teacher/positive_reward_in_top_5_percent"


def recipe(model: Mapping[str, Any] | None = None, *, tied: bool = False, **stage: Any) -> dict[str, Any]:
    """10 steps on 12 prompts, micro-batches of two to five rows, and a student of two layers."""
    settings = {
        "steps": STEPS,
        "prompts_per_step": 4,
        "micro_batch_tokens": 24,
        "sampling": {"max_completion_length": 6, "top_p": 0.95},
        # A large eps: where a gradient is rounding alone, Adam would make a full step of it.
        "optimizer": {"learning_rate": 0.003, "schedule": "cosine", "warmup_steps": 2, "eps": 1e-4},
        "checkpoint": {"every": HALF, "keep": 2},
        "samples_every": 5,
    }
    made = one_stage(**(settings | stage))
    made["models"]["student"] = tiny_model(2, **(model or {}))
    made["models"]["student"]["init"] |= {"num_hidden_layers": 2, "tie_word_embeddings": tied}
    return made


def two_teachers(**stage: Any) -> dict[str, Any]:
    """Two tasks with teachers of different sizes; a process has rows of one of them, or of both."""
    tasks = {
        "sums": {"teacher": "teacher", "data": {"path": "train.jsonl"}, "reward": {"name": "final_number"}},
        "more": {
            "teacher": "larger",
            "data": {"path": "held_out.jsonl"},
            "sampling": {"max_completion_length": 3},
            "evaluate": {"data": {"path": "held_out.jsonl"}, "sampling": EVALUATE["sampling"], "kl": True},
        },
    }
    made = recipe(tasks=tasks, teacher=None, data=None, **stage)
    made["models"]["larger"] = tiny_model(4, hidden_size=24)
    return made


def experts(**stage: Any) -> dict[str, Any]:
    """The student has four experts in each layer, of which a token takes two."""
    made = recipe(**stage)
    mixture = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    made["models"]["student"]["init"] |= mixture
    return made


def debate(model: Mapping[str, Any] | None = None, **stage: Any) -> dict[str, Any]:
    """Two teachers of different sizes, which score every row after a debate."""
    made = recipe(model, method="mad_opd", teacher="teacher+larger", prompts_per_step=3, **stage)
    made["models"]["larger"] = tiny_model(4, hidden_size=24)
    return made


def several_models(model: Mapping[str, Any] | None = None, **stage: Any) -> dict[str, Any]:
    """Two models that teach each other, with an evaluation against the peer."""
    evaluate = {"data": {"path": "held_out.jsonl"}, "sampling": EVALUATE["sampling"], "kl": True}
    tasks = {
        "sums": {"train": "student", "data": {"path": "train.jsonl"}, "evaluate": evaluate},
        "more": {"train": "second", "data": {"path": "held_out.jsonl"}},
    }
    for task in tasks.values():
        task["reward"] = {"name": "ranks:odd"}
    made = recipe(
        model,
        train="student",
        peers=["second"],
        method="copd",
        options={"alone": 1, "together": 2},
        tasks=tasks,
        task_order="mixed",
        teacher=None,
        data=None,
        prompts_per_step=5,
        **stage,
    )
    made["models"] = {"student": made["models"]["student"], "second": made["models"]["student"]}
    return made


LORA = {"lora": {"rank": 2, "alpha": 4}}
TEXTS = {"opening": "{prompt}", "reply": "{prompt}+{debate}", "reads": "{prompt}={debate}", "turn": "{text}"}
SELF = {"template": "{privileged_context}{prompt}", "k": None}
EMA = SELF | {"teacher": "ema", "decay": 0.7}
GROUPS = {"sampling": {"max_completion_length": 5, "n": 4}, "reward": {"name": "ranks:odd"}, "teacher": None}
BEST: dict[str, Any] = {
    "method": "brts",
    "options": {"k": 4, "n": 2, "hint": "{answer}+{prompt}", "marker": "+", "weight": 2.0},
    "reward": {"name": "ranks:rare"},
}
ENDS = {"max_completion_length": 12, "n": 2, "stop": ["=", ";", "7"]}
TALKING: dict[str, Any] = {"environment": {"name": "talking:talker"}, "sampling": ENDS}
TALKS = {"data": {"path": "held_out.jsonl"}, "sampling": {"drawn": ENDS}}
DRIFT = {"k": 4, "threshold": 0.7, "drop": 0.4}
SCENARIOS = {
    "full tied, reverse_kl": recipe(tied=True, evaluate=EVALUATE, optimizer={"learning_rate": 0.003}),
    "full untied, topk_reverse_kl, 3 prompts": recipe(
        method="topk_reverse_kl",
        options={"k": 4, "by": "union"},
        prompts_per_step=3,
        diagnostics={"every": 4, "k": 4, "bucket": 2},
        reward={"name": "ranks:odd"},
    ),
    "lora, grpo, prompts twice in a step": recipe(LORA, method="grpo", prompts_per_step=5, **GROUPS),
    "full tied, grpo, few long rows": recipe(tied=True, method="grpo", prompts_per_step=3, **GROUPS),
    "full untied, a moving average": recipe(
        method="context_distillation", options=EMA, teacher=None, prompts_per_step=3
    ),
    "lora, a moving average": recipe(LORA, method="context_distillation", options=EMA | {"k": 4}, teacher=None),
    "lora, the base": recipe(LORA, method="context_distillation", options=SELF, teacher=None, evaluate=EVALUATE),
    "full tied, itself": recipe(
        tied=True, method="context_distillation", options=SELF | {"teacher": "live"}, teacher=None
    ),
    "full tied, what passes a filter": recipe(  # in some steps nothing does
        tied=True,
        method="sft",
        options={"source": "teacher", "keep": "correct"},
        reward={"name": "ranks:rare"},
        prompts_per_step=2,
        sampling={"max_completion_length": 5, "n": 2},
    ),
    "full untied, tokens of one process": recipe(
        method="ranks:some_masked", prompts_per_step=2, data={"path": "train.jsonl", "limit": 2}
    ),
    "full untied, jumps": recipe(
        method="eff_opd", options={"validate_by": "teacher_kl", "prompts": 5}, prompts_per_step=3
    ),
    "lora, jumps by the reward": recipe(
        LORA, method="eff_opd", options={"prompts": 6, "ties": True}, reward={"name": "ranks:odd"}
    ),
    "full tied, a moving average that jumps": recipe(
        tied=True, method="ranks:jumping_average", teacher=None, prompts_per_step=3
    ),
    "full tied, away from itself": recipe(
        tied=True,
        method="anti_sd",
        options={"template": EMA["template"], "warm_up": 3, "closes_below": 0.99},
        prompts_per_step=3,
        **GROUPS,
    ),
    "lora, sized by itself": recipe(
        LORA,
        method="visd",
        options={"template": EMA["template"], "hint": "privileged_context", "k": 4, "fades": 6},
        prompts_per_step=3,
        **GROUPS,
    ),
    "full tied, from right responses": recipe(
        tied=True,
        method="sdpo",
        options={"template": EMA["template"], "k": 4, "decay": 0.7, "otherwise": "privileged_context"},
        prompts_per_step=3,
        **GROUPS,
    ),
    "lora, standardised by group": recipe(LORA, method="top_d", prompts_per_step=3, **{**GROUPS, "teacher": "teacher"}),
    "full tied, in the order of outcomes": recipe(
        tied=True,
        method="uni_opd",
        options={"delta": 1.0},
        prompts_per_step=3,
        **{**GROUPS, "teacher": "teacher"},
    ),
    "full tied, a budget of what drifts": recipe(
        tied=True,
        method="prune_opd",
        options=DRIFT | {"budget": 4, "budget_min": 2, "budget_max": 6, "budget_step": 1, "margin": 1, "patience": 2},
        prompts_per_step=3,
    ),
    "lora, what drifts ends": recipe(
        LORA, method="prune_opd", options=DRIFT | {"stop": "rollout", "every": 2}, prompts_per_step=3
    ),
    "lora, a base that is the student without its adapter": recipe(
        LORA,
        method="extrapolated_opd",
        options={"strength": 1.5},
        base="student",
        prompts_per_step=3,
        sampling={"max_completion_length": 6},
    ),
    "full tied, the best of the teacher's responses": recipe(  # of some prompts there is none
        tied=True, prompts_per_step=3, **BEST | {"options": BEST["options"] | {"fallback": "skip"}}
    ),
    "lora, the best of the teacher's responses": recipe(LORA, prompts_per_step=5, **BEST),
    "full tied, conversations": recipe(tied=True, method="opd", options={"gamma": 0.9}, prompts_per_step=3, **TALKING),
    "lora, conversations in groups": recipe(
        LORA, method="grpo", prompts_per_step=5, **TALKING | {"teacher": None, "evaluate": TALKS}
    ),
    "full untied, experts that are balanced": experts(router_aux_loss=0.3, prompts_per_step=5),
    "full tied, a debate": debate(options=TEXTS | {"tag": r"1(\d)"}),
    "lora, a debate in turn": debate(LORA, options=TEXTS | {"tag": r"1(\d)", "beta": 0.4, "missing": "zero"}),
    "full untied, two teachers in every step": two_teachers(task_order="mixed", prompts_per_step=5),
    "full untied, models that teach each other": several_models(sampling={"max_completion_length": 5, "n": 4}),
    "lora, models that teach each other": several_models(LORA, sampling={"max_completion_length": 5, "n": 4}),
    "full untied, two teachers in turn": two_teachers(
        method="topk_reverse_kl", options={"k": 4, "by": "teacher", "form": "tail"}
    ),
}


def torchrun(processes: int, *arguments: str, judge: str = "in", **options: Any) -> subprocess.Popen[str]:
    """`torchrun ARGUMENTS`, started; a free port is found by torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *arguments],
        env={**ENVIRONMENT, "PYTHONPATH": PATH, "JUDGE": judge},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen[str], seconds: float = 600) -> Ended:
    """Raises AssertionError for a process that hangs: long before `parallel.PATIENCE` is over."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"It hangs.\n{out[-2000:]}\n{err[-4000:]}") from None
    return Ended(process.returncode, out, err)


def trained(folder: Path, step: int | None = None) -> dict[str, dict[str, Tensor]]:
    """The tensors of the last checkpoint of a folder's run, or of that of `step`."""
    checkpoints = folder / "run/distil/checkpoints"
    last = checkpoint.latest(checkpoints) if step is None else checkpoints / f"step_{step:06d}"
    assert last is not None
    return checkpoint.load(last).tensors


def assert_equal_training(one: Path, other: Path) -> None:
    """Every trained tensor within 2e-5 of its largest entry, every moment within 1e-4 of the largest of its kind."""
    wanted, got = trained(one), trained(other)
    assert {group: sorted(named) for group, named in got.items()} == {
        group: sorted(named) for group, named in wanted.items()
    }
    for group, named in wanted.items():
        largest = max(tensor.abs().max().item() for tensor in named.values())
        for name, tensor in named.items():
            off = (got[group][name] - tensor).abs().max().item()
            allowed = 1e-4 * largest if group.startswith("adamw.") else CLOSE * tensor.abs().max().item()
            assert off <= allowed, f"{group} {name}: off by {off:.3g}, largest entry {tensor.abs().max():.3g}"


def assert_equal_numbers(one: Path, other: Path) -> None:
    rows, others = (
        [json.loads(line) for line in (folder / "run/distil/metrics.jsonl").read_text().splitlines()]
        for folder in (one, other)
    )
    assert len(rows) == len(others)
    for row, got in zip(rows, others, strict=True):
        # A share of a sum of differences of log-probs: with a teacher close to the student that sum is small.
        assert got.pop(SHARE, 0.0) == pytest.approx(row.pop(SHARE, 0.0), rel=10 * CLOSE)
        assert got == pytest.approx(row, rel=CLOSE, abs=1e-6)  # a divergence of float32 log-probs


def assert_equal_responses(one: Path, other: Path) -> None:
    from opd.stage.folder import StageDir

    rows, got = (StageDir(folder / "run/distil").read_samples() for folder in (one, other))
    for key in ("step", "prompt_id", "sample", "part", "response", "reward"):
        assert [row[key] for row in got] == [row[key] for row in rows], key


def assert_equal_runs(one: Path, other: Path) -> None:
    assert_equal_training(one, other)
    assert_equal_numbers(one, other)
    assert_equal_responses(one, other)
    own = ("step_", "texts-")  # of each process
    files = [
        sorted(str(f.relative_to(w / "run")) for f in (w / "run").rglob("*") if not any(n in str(f) for n in own))
        for w in (one, other)
    ]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders one/N and two/N of every scenario, run by one and by two processes."""
    root = tmp_path_factory.mktemp("ranks")
    for processes in ("one", "two"):
        for number, made in enumerate(SCENARIOS.values()):
            prepare(root / processes / str(number), made)
    folders = [str(root / "two" / str(number)) for number in range(len(SCENARIOS))]
    process = torchrun(2, str(HERE / "ranks.py"), *folders)
    try:
        in_this_process([root / "one" / str(number) for number in range(len(SCENARIOS))])
    except BaseException:
        process.terminate()
        raise
    done = ended(process)
    assert done.code == 0, done.err
    return root


def in_this_process(folders: list[Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[0])
        patch.syspath_prepend(HERE)
        ranks.main(list(map(str, folders)))


@pytest.mark.parametrize("name", SCENARIOS)
def test_train_gives_equal_run_when_processes_are_two(runs: Path, name: str):
    number = str(list(SCENARIOS).index(name))
    assert_equal_runs(runs / "one" / number, runs / "two" / number)


def test_update_skipped_takes_both_values_when_rows_are_filtered(runs: Path):
    number = list(SCENARIOS).index("full tied, what passes a filter")
    lines = (runs / "two" / str(number) / "run/distil/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["train/update_skipped"] for line in lines} == {0.0, 1.0}


def test_brts_leaves_a_process_without_rows_of_the_teacher(runs: Path):
    number = list(SCENARIOS).index("full tied, the best of the teacher's responses")
    lines = (runs / "two" / str(number) / "run/distil/metrics.jsonl").read_text().splitlines()
    assert {0.0, 1.0} & {json.loads(line)["part/teacher/rows"] for line in lines}
    assert max(json.loads(line)["part/teacher/rows"] for line in lines) >= 1.0


def test_prune_opd_moves_budget_and_ends_drifted_rollouts(runs: Path):
    def column(name: str, key: str) -> list[float]:
        number = list(SCENARIOS).index(name)
        lines = (runs / "two" / str(number) / "run/distil/metrics.jsonl").read_text().splitlines()
        return [json.loads(line)[key] for line in lines]

    assert len(set(column("full tied, a budget of what drifts", "budget/tokens"))) > 1
    assert any(0 < share < 1 for share in column("lora, what drifts ends", "drift/ended_share"))


def test_adamw_on_shards_equals_whole_and_unfused(tmp_path: Path):
    """To the last places, which depend on an entry's place in a vector of the processor: it may be fused there."""
    process = torchrun(2, str(HERE / "shards.py"), str(tmp_path / "two.pt"))
    alone = shards.updated(ALONE, fused=True)
    done = ended(process)
    assert done.code == 0, done.err
    found = torch.load(tmp_path / "two.pt")
    assert sorted(found[True]) == sorted(found[False]) == sorted(alone)
    for name, wanted in alone.items():
        for fused in (True, False):
            torch.testing.assert_close(found[fused][name], wanted, atol=1e-7, rtol=5e-7, msg=f"{name}, fused: {fused}")


# --- going on with another number of processes -----------------------------------------------------------------------


def stopped_in_the_middle(finished: Path, folder: Path) -> Path:
    """What a kill after the checkpoint of step 5 leaves of a finished run."""
    shutil.copytree(finished, folder)
    stage = folder / "run/distil"
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "model")
    shutil.rmtree(stage / f"checkpoints/step_{STEPS:06d}")
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "PYTHONPATH", PATH)
        process = Forks()
    yield process
    process.close()


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ("one", 2, "full untied, a moving average"),
        ("two", 2, "lora, a moving average"),
        ("two", 1, "lora, a moving average"),
        ("two", 3, "lora, a moving average"),  # more processes than rows of an adapter
        ("two", 3, "full tied, reverse_kl"),
    ],
)
def test_resume_gives_equal_run_for_any_process_count(
    tmp_path: Path, runs: Path, forks: Forks, before: str, after: int, name: str
):
    number = str(list(SCENARIOS).index(name))
    folder = stopped_in_the_middle(runs / before / number, tmp_path / "work")
    again = forks.start(folder, "train", "recipe.yaml", processes=after)
    assert again.code == 0, again.err
    assert again.out.count(f"distil: continuing after step {HALF} of {STEPS}") == 1
    assert_equal_runs(runs / "one" / number, folder)
    if after == 2 and before == "two":  # with the same number, byte for byte
        metrics = "run/distil/metrics.jsonl"
        assert (folder / metrics).read_bytes() == (runs / "two" / number / metrics).read_bytes()


# --- stops and errors ------------------------------------------------------------------------------------------------

GRPO = str(list(SCENARIOS).index("full tied, grpo, few long rows"))
TRAIN = ("-m", "opd", "train", "recipe.yaml")


def test_sigint_stops_all_processes_after_same_step(tmp_path: Path, runs: Path, forks: Forks):
    folder = prepare(tmp_path / "work", SCENARIOS["full tied, grpo, few long rows"])
    process = torchrun(2, *TRAIN, cwd=folder, judge="slow")
    metrics = folder / "run/distil/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # torchrun passes it on to its processes
    stopped = ended(process)
    assert stopped.code != 0
    assert stopped.out.count("Stopping after this step; press Ctrl-C again to stop at once.") == 1
    assert stopped.err.count("of stage 'distil'; everything is saved. The same command continues from there.") == 1
    last = checkpoint.latest(folder / "run/distil/checkpoints")
    assert last is not None
    step = checkpoint.load(last).step
    assert 1 <= step < STEPS
    assert metrics.read_text().count("\n") == step
    again = forks.start(folder, "train", "recipe.yaml", processes=2)
    assert again.code == 0, again.err
    assert f"distil: continuing after step {step} of {STEPS}" in again.out
    assert_equal_runs(runs / "one" / GRPO, folder)


def test_train_prints_error_once_when_one_process_fails(tmp_path: Path, runs: Path, forks: Forks):
    folder = prepare(tmp_path / "work", SCENARIOS["full tied, grpo, few long rows"])
    failed = ended(torchrun(2, *TRAIN, cwd=folder, judge="out"))
    assert failed.code != 0
    assert failed.err.count("TrainingError: ") == 1
    assert failed.err.count("the judge is out") == 1
    assert "Connection" not in failed.err
    again = forks.start(folder, "train", "recipe.yaml", processes=2)
    assert again.code == 0, again.err
    assert f"distil: continuing after step {HALF} of {STEPS}" in again.out
    assert_equal_runs(runs / "one" / GRPO, folder)


IN_A_STEP = Strike(call="opd.loss.step.loss_of", nth=4)  # the other one waits for its gradient
IN_ITS_SHARD = Strike(call="safetensors.torch.save", nth=5)  # of the second checkpoint


@pytest.mark.parametrize(
    ("strike", "goes_on", "after"),
    [
        (IN_A_STEP, "distil: after step 0", 2),
        (IN_ITS_SHARD, f"distil: continuing after step {HALF} of {STEPS}", 1),
        (IN_ITS_SHARD, f"distil: continuing after step {HALF} of {STEPS}", 2),
        (IN_ITS_SHARD, f"distil: continuing after step {HALF} of {STEPS}", 3),
    ],
)
def test_resume_gives_equal_run_when_one_process_was_killed(
    tmp_path: Path, runs: Path, forks: Forks, strike: Strike, goes_on: str, after: int
):
    number = str(list(SCENARIOS).index("full tied, reverse_kl"))
    folder = prepare(tmp_path / "work", SCENARIOS["full tied, reverse_kl"])
    killed = forks.start(folder, "train", "recipe.yaml", processes=2, strike=strike)
    assert killed.code not in (0, 97)
    assert killed.err.count("RunError: Another process of this run died") == 1
    assert "Traceback" not in killed.err
    again = forks.start(folder, "train", "recipe.yaml", processes=after)
    assert again.code == 0, again.err
    assert goes_on in again.out
    assert_equal_runs(runs / "one" / number, folder)


def test_sigint_stops_all_processes_when_sent_to_one(tmp_path: Path, runs: Path, forks: Forks):
    number = str(list(SCENARIOS).index("full tied, reverse_kl"))
    folder = prepare(tmp_path / "work", SCENARIOS["full tied, reverse_kl"])
    strike = Strike(call="opd.train.gradient", nth=3, when="after", signals=("SIGINT",))
    stopped = forks.start(folder, "train", "recipe.yaml", processes=2, strike=strike)
    assert stopped.code in (1, 130)
    assert stopped.err.count("Stopped after step 3 of 10 of stage 'distil'; everything is saved.") == 1
    again = forks.start(folder, "train", "recipe.yaml", processes=3)
    assert again.code == 0, again.err
    assert_equal_runs(runs / "one" / number, folder)


@pytest.mark.parametrize(
    ("scenario", "overrides", "message"),
    [
        ("full tied, reverse_kl", "prompts_per_step=1", "prompts_per_step is 1, and 2 processes were started: each"),
        ("full tied, reverse_kl", "prompts_per_stepp=1", "unknown key `prompts_per_stepp`"),
        (
            "lora, grpo, prompts twice in a step",
            "data.limit=3 prompts_per_step=2 steps=900",
            "compares the responses to one prompt in one process",
        ),
        (
            "full untied, tokens of one process",
            "method=ranks:all_masked",
            "None of this step's 2 responses has a trained token",
        ),
        (
            "full tied, reverse_kl",
            "optimizer.learning_rate=1e30 optimizer.max_grad_norm=1e30",
            "The update was skipped.",
        ),
    ],
)
def test_train_prints_error_once_when_all_processes_fail(
    tmp_path: Path, forks: Forks, scenario: str, overrides: str, message: str
):
    folder = prepare(tmp_path / "work", SCENARIOS[scenario])
    failed = forks.start(folder, "train", "recipe.yaml", *overrides.split(), processes=2)
    assert failed.code not in (0, 97)
    assert failed.err.count(message) == 1, failed.err
    assert failed.err.count("Error: ") == 1, failed.err
    assert "Traceback" not in failed.err
