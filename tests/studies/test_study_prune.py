"""The study of responses that end early: what a run cost, and rules that look at what it saves and what it loses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.study_numbers import spread
from support.study_numbers.drifting import prune_numbers

from opd_studies.claims import prune
from opd_studies.lab import ablation
from opd_studies.lab.distilling import Trained
from opd_studies.page.outcome import state


def test_prune_cost_gives_tokens_seconds_and_lost_share(tmp_path: Path):
    stage = tmp_path / "run" / "distil"
    stage.mkdir(parents=True)
    rows = [{"step": i, "rollout/length": 3.0 + i, "drift/lost_share": 0.2 * i} for i in range(1, 4)]
    timings = "".join(json.dumps({"step": i, "cpu": 0.5 * i, "total": 99.0}) + "\n" for i in range(1, 4))
    (stage / "timings.jsonl").write_text(timings)
    trained = Trained(model=stage / "model", before={}, after={}, last={}, rows=rows, evaluations=[])
    size = ablation.Size(prompts_per_step=10)
    assert prune.cost(trained, size) == pytest.approx({"tokens": 10 * (4 + 5 + 6), "seconds": 3.0, "lost": 0.4})
    plain = [{name: value for name, value in row.items() if "lost" not in name} for row in rows]
    unwatched = Trained(model=stage / "model", before={}, after={}, last={}, rows=plain, evaluations=[])
    assert set(prune.cost(unwatched, size)) == {"tokens", "seconds"}


@pytest.mark.parametrize(
    ("what", "value", "failing"),
    [
        ("tokens", 7.1e4, [0]),  # 29 % fewer are not 30 %
        ("KL", 1.06, [0, 4]),  # fewer tokens, and further from the teacher
        ("seconds", 12.6, [3]),  # looks that cost more than the tokens that they save
        ("sampled accuracy", 0.24, [3]),
    ],
)
def test_prune_judge_rejects_saving_that_costs_elsewhere(what: str, value: float, failing: list[int]):
    numbers = prune_numbers(True, False)
    assert [state(one.checks) for one in prune.judge(numbers)] == ["holds"] * 5
    numbers["A: stop"] = {**numbers["A: stop"], what: spread(value)}
    states = [state(one.checks) for one in prune.judge(numbers)]
    assert [i for i, one in enumerate(states) if one == "contradicted"] == failing
