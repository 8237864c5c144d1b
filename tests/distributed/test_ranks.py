"""Two processes are one: the same parameters, moments, metrics and responses, whoever has which prompts.

Real processes under torchrun, on gloo. Several recipes share a pair of processes, which saves imports.
"""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ranks
from run_helpers import ENVIRONMENT, Ended, EVALUATE, one_stage, prepare, tiny_model
from torch import Tensor

from opd import checkpoint

HERE = Path(__file__).parent
STEPS = 20
CLOSE = 1e-5


def recipe(model: Mapping[str, Any] | None = None, *, tied: bool = False, **stage: Any) -> dict[str, Any]:
    """20 steps on 12 prompts, micro-batches of two to five rows, and a student of two layers."""
    settings = {
        "steps": STEPS,
        "prompts_per_step": 4,
        "micro_batch_tokens": 24,
        "sampling": {"max_completion_length": 6, "top_p": 0.95},
        # A large eps: where a gradient is rounding alone, Adam would make a full step of it.
        "optimizer": {"learning_rate": 0.003, "schedule": "cosine", "warmup_steps": 2, "eps": 1e-4},
        "checkpoint": {"every": 10, "keep": 2},
        "samples_every": 5,
    }
    made = one_stage(**(settings | stage))
    made["models"]["student"] = tiny_model(2, **(model or {}))
    made["models"]["student"]["init"] |= {"num_hidden_layers": 2, "tie_word_embeddings": tied}
    return made


LORA = {"lora": {"rank": 2, "alpha": 4}}
EMA = {"template": "{privileged_context}{prompt}", "teacher": "ema", "decay": 0.7}
GROUPS = {"sampling": {"max_completion_length": 5, "n": 4}, "reward": {"name": "ranks:odd"}, "teacher": None}
SCENARIOS = {
    "full tied, reverse_kl": recipe(tied=True, evaluate=EVALUATE, optimizer={"learning_rate": 0.003}),
    "full untied, topk_reverse_kl, 3 prompts": recipe(
        method="topk_reverse_kl", options={"k": 4, "by": "union"}, prompts_per_step=3
    ),
    "lora, grpo, prompts twice in a step": recipe(LORA, method="grpo", prompts_per_step=5, **GROUPS),
    "full tied, grpo, few long rows": recipe(tied=True, method="grpo", prompts_per_step=3, **GROUPS),
    "full untied, a moving average": recipe(
        method="context_distillation", options=EMA, teacher=None, prompts_per_step=3, evaluate=EVALUATE
    ),
    "lora, a moving average": recipe(LORA, method="context_distillation", options=EMA | {"k": 4}, teacher=None),
    "lora, the base": recipe(
        LORA, method="context_distillation", options={"template": EMA["template"]}, teacher=None, evaluate=EVALUATE
    ),
    "full tied, itself": recipe(
        tied=True, method="context_distillation", options={"template": EMA["template"], "teacher": "live"}, teacher=None
    ),
    "lora, gkd, data": recipe(LORA, method="gkd", options={"on_policy_share": 0.5}, prompts_per_step=3),
    "full untied, tokens of one process": recipe(
        method="ranks:some_masked", prompts_per_step=2, data={"path": "train.jsonl", "limit": 2}
    ),
}


def torchrun(processes: int, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`torchrun ARGUMENTS`, started; a free port is found by torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *arguments],
        env={**ENVIRONMENT, "PYTHONPATH": f"{HERE}:{HERE.parent}:{ENVIRONMENT.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen[str], seconds: float = 90) -> Ended:
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
    """Every trained tensor within 1e-5 of its largest entry, every moment within 1e-4 of the largest of its kind."""
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
        assert got == pytest.approx(row, rel=CLOSE, abs=1e-6)  # a divergence of float32 log-probs



def assert_equal_responses(one: Path, other: Path) -> None:
    from opd.rundir import StageDir

    rows, got = (StageDir(folder / "run/distil").read_samples() for folder in (one, other))
    for key in ("step", "prompt_id", "sample", "response", "reward"):
        assert [row[key] for row in got] == [row[key] for row in rows], key


def assert_equal_runs(one: Path, other: Path) -> None:
    assert_equal_training(one, other)
    assert_equal_numbers(one, other)
    assert_equal_responses(one, other)
    files = [sorted(str(f.relative_to(w / "run")) for f in (w / "run").rglob("*") if "step_" not in str(f)) for w in (one, other)]
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
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.syspath_prepend(HERE)
            ranks.main([str(root / "one" / str(number)) for number in range(len(SCENARIOS))])
    except BaseException:
        process.terminate()
        raise
    done = ended(process)
    assert done.code == 0, done.err
    return root


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(runs: Path, name: str):
    number = str(list(SCENARIOS).index(name))
    assert_equal_runs(runs / "one" / number, runs / "two" / number)
