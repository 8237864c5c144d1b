"""Studies: verdicts follow from numbers, measurements agree with plain Python, models are cached, the page is whole."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from opd.cli import app
from opd.errors import ConfigError
from opd.statistics import Interval
from opd.studies import (
    STUDIES,
    estimators,
    fixed_points,
    forms,
    gamma,
    headline,
    prefixes,
    privileged,
    report,
)
from opd.studies import lab as labs
from opd.studies.lab import Lab, PairSize
from opd.studies.outcome import Check, Finding, Outcome, differences, finding, over_seeds, short, verdict

ROOT = Path(__file__).parents[2]
ARXIV = re.compile(r"\b2\d{3}\.\d{5}\b")


# --- intervals and verdicts -----------------------------------------------------------------------------------------


def student_t_tail(t: float, degrees: int, pieces: int = 20_000) -> float:
    """P(|T| > t), by the trapezium rule on the density, in plain Python."""
    factor = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    height = [factor * (1 + (t * i / pieces) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(pieces + 1)]
    return 1 - 2 * (t / pieces) * (math.fsum(height) - (height[0] + height[-1]) / 2)


@pytest.mark.parametrize("n", range(3, 21))
def test_an_interval_over_seeds_is_students_t(n):
    values = [math.sin(3 * i) for i in range(n)]
    interval = over_seeds(values)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    assert interval.mean == pytest.approx(mean)
    assert student_t_tail((interval.high - mean) / error, n - 1) == pytest.approx(0.05, abs=2e-4)
    assert interval.high - mean == pytest.approx(mean - interval.low)


@pytest.mark.parametrize("n", [0, 2, 21])
def test_too_few_or_too_many_seeds_are_refused(n):
    with pytest.raises(ConfigError, match=f"needs 3 to 20 seeds, got {n}. Give more seeds"):
        over_seeds([0.0] * n)


def test_differences_pair_the_seeds():
    assert differences([1.0, 2.0, 3.0], [0.9, 1.9, 2.9]).high == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shorter"):
        differences([1.0, 2.0, 3.0], [1.0, 2.0])


def check(low: float, high: float, **bounds: float) -> Check:
    return Check(what="x", interval=Interval((low + high) / 2, low, high), **bounds)


def test_a_check_wants_the_whole_interval_on_its_side():
    assert check(0.2, 0.4, above=0.1).holds
    assert not check(0.05, 0.4, above=0.1).holds
    assert check(-0.4, -0.2, below=-0.1).holds
    assert not check(-0.4, 0.0, below=-0.1).holds
    assert check(-0.05, 0.05, above=-0.1, below=0.1).holds
    assert not check(-0.05, 0.2, above=-0.1, below=0.1).holds
    assert not check(math.nan, math.nan, above=-1.0).holds
    with pytest.raises(AssertionError, match="cannot fail"):
        check(0.0, 1.0)


def test_a_verdict_needs_all_checks_of_one_setting():
    yes, no = check(1.0, 2.0, above=0.0), check(-2.0, -1.0, above=0.0)
    assert verdict([yes, yes], [no]) == "holds"
    assert verdict([yes, no]) == "does not hold"
    assert verdict([yes, no], [yes]) == "holds in setting B only"
    assert verdict([no], [yes, no]) == "does not hold"
    with pytest.raises(AssertionError):
        verdict([])


def test_a_finding_tells_number_interval_rule_and_both_settings():
    one = finding("c", "2605.11182", [check(0.1, 0.3, above=0.25)], [check(0.5, 0.7, above=0.25, below=0.9)])
    assert (
        one.measured == "A: x 0.2 [0.1, 0.3] (claim: above 0.25). B: x 0.6 [0.5, 0.7] (claim: above 0.25 and below 0.9)"
    )
    assert one.verdict == "holds in setting B only"


def test_short_numbers():
    assert [short(v) for v in (0.0, 0.12345, 1234.5, -1e-7, 3.2e8)] == [
        "0",
        "0.123",
        "1.23e+03",
        "-1.00e-07",
        "3.20e+08",
    ]


# --- every study's rule: numbers as claimed, and their opposite -----------------------------------------------------


def spread(value: float, n: int = 3) -> list[float]:
    """Seeds that differ a little, by no more than a thousandth."""
    return [value + 1e-3 * abs(value) * (i - (n - 1) / 2) / n for i in range(n)]


def fixed_point_numbers(good: bool, near: bool = True) -> fixed_points.Numbers:
    """`near` False: the crash of the nearer starts alone."""
    q = spread(0.6)
    mass: dict[str, dict[str, torch.Tensor]] = {start.name: {} for start in fixed_points.STARTS}
    far = fixed_points.STARTS[-1].name
    resting = {"raw": 1 / math.e, "renormalised": 0.4} if good else {"renormalised": 1.0}
    for form in forms.FORMS:
        path = torch.full((200, 3), 1.0, dtype=torch.float64)
        path[-1] = resting.get(form, 1.0 if good else 0.7)
        mass[far][form] = path * torch.tensor(q)
        for i, start in enumerate(fixed_points.STARTS[:-1]):
            path = torch.full((200, 3), 0.99, dtype=torch.float64)
            late = 150 if start.k == 20 else 20
            path[late if good and (near or i >= 2) else 10 :] = 0.37
            mass[start.name][form] = path * torch.tensor(q)
    return fixed_points.Numbers(
        identities={"a": spread(1e-15 if good else 1e-3), "b": spread(1e-16)},
        teacher_mass=dict.fromkeys(mass, q),
        mass=mass,
        shape_error={form: spread(1e-4 if good else 0.3) for form in forms.FORMS},
    )


def gamma_numbers(good_a: bool, good_b: bool) -> gamma.Numbers:
    def varied(good: bool, ratio: float) -> torch.Tensor:
        powers = torch.tensor(gamma.GAMMAS, dtype=torch.float64)
        row = 0.2 * ratio ** (powers if good else -powers)
        return torch.stack([row * (1 + 0.01 * i) for i in range(3)])

    return gamma.Numbers(
        variance={"A": varied(good_a, 100.0), "B": varied(good_b, 100.0)},
        distance={"A": varied(good_a, 20.0), "B": varied(good_b, 20.0)},
        teacher_distance={"A": torch.ones(3), "B": torch.ones(3)},
        curve={},
        paths={},
    )


def privileged_numbers(good: bool) -> privileged.Numbers:
    small, large = (1e-5, 0.95) if good else (0.95, 1e-5)
    by_design = {"shared": spread(large), "instance": spread(small)}
    return privileged.Numbers(
        to_geometric=spread(small),
        to_arithmetic=spread(large),
        value_error=spread(small),
        disagreement={"shared": spread(small), "instance": spread(large)},
        kept=by_design,
        kept_train=by_design,
        kept_held_out=by_design,
        curve={},
    )


def estimator_numbers(good: bool) -> estimators.Numbers:
    small, large = (1e-7, 0.8) if good else (0.8, 1e-7)
    low = {"raw": 0.5, "renormalised": 0.4, "stop_gradient": 0.1, "tail": 0.05, "released_code": 0.1}
    return estimators.Numbers(
        bias={f: {k: spread(v if good else 0.6 - v) for k in estimators.KS} for f, v in low.items()},
        sampled_bias=spread(small),
        sampled_noise=spread(large),
        differentiated_mean=spread(small),
        differentiated_noise=spread(large),
        student_mass={},
        teacher_mass={},
        tokens=[10] * 3,
    )


def prefix_numbers(good_a: bool, good_b: bool) -> dict[str, prefixes.Numbers]:
    def one(good: bool) -> prefixes.Numbers:
        shares = (1.0, 0.9, 0.6, 0.3, 0.2) if good else (0.5, 0.5, 0.6, 0.8, 0.9)
        return prefixes.Numbers(
            student=spread(0.1),
            continued={d: spread(v) for d, v in zip(prefixes.DEPTHS, shares, strict=True)},
            right_to_wrong=spread(0.1),
            wrong_to_right=spread(0.1),
        )

    return {"A": one(good_a), "B": one(good_b)}


NUMBERS: dict[str, tuple[Any, Any]] = {
    "fixed_points": (fixed_point_numbers(True), fixed_point_numbers(False)),
    "gamma": (gamma_numbers(True, True), gamma_numbers(False, False)),
    "privileged": (privileged_numbers(True), privileged_numbers(False)),
    "estimators": (estimator_numbers(True), estimator_numbers(False)),
    "prefixes": (prefix_numbers(True, True), prefix_numbers(False, False)),
}


def module_of(name: str) -> ModuleType:
    return sys.modules[STUDIES[name].__module__]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_reruns(name):
    module = module_of(name)
    assert module.__name__ == f"opd.studies.{name}"
    assert headline(name)
    assert ARXIV.search(module.__doc__ or ""), "the docstring cites the paper"
    for one in module.judge(NUMBERS[name][0]):
        assert ARXIV.search(one.citation)
        assert re.search(r"eq\.|Fig\.|section|appendix|A\.\d|Table", one.citation)


@pytest.mark.parametrize("name", STUDIES)
def test_opposite_numbers_give_the_opposite_verdict(name):
    as_claimed, opposite = NUMBERS[name]
    assert [one.verdict for one in module_of(name).judge(as_claimed) if one.verdict != "holds"] == []
    assert [one.claim for one in module_of(name).judge(opposite) if one.verdict != "does not hold"] == []


def test_a_second_setting_counts_where_the_first_one_fails():
    assert {one.verdict for one in gamma.judge(gamma_numbers(False, True))} == {"holds in setting B only"}
    assert {one.verdict for one in prefixes.judge(prefix_numbers(False, True))} == {"holds in setting B only"}
    assert fixed_points.judge(fixed_point_numbers(True, near=False))[-1].verdict == "holds in setting B only"


def test_a_plateau_lasts_until_nine_tenths():
    numbers = fixed_point_numbers(True)
    near5, near20 = (start.name for start in fixed_points.STARTS[:2])
    assert fixed_points.lengths(numbers, near5) == [20.0] * 3
    assert fixed_points.lengths(numbers, near20) == [150.0] * 3


# --- models, kept by what made them ---------------------------------------------------------------------------------

TINY = PairSize(
    teacher={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    student={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    teacher_steps=2,
    student_steps=2,
    prompts_per_step=4,
)


def test_a_fingerprint_is_of_the_recipe_and_the_library_not_of_the_place(tmp_path, monkeypatch):
    here, there = Lab(folder=tmp_path / "a"), Lab(folder=tmp_path / "b")

    def recipe(lab: Lab, seed: int) -> dict[str, Any]:
        made = labs.student_recipe(seed, TINY)
        return made | {"models": {"student": {"path": str(lab.folder / "x" / "model")}}}

    assert here.fingerprint(recipe(here, 0)) == there.fingerprint(recipe(there, 0))
    assert here.fingerprint(recipe(here, 0)) != here.fingerprint(recipe(here, 1))
    longer = replace(TINY, student_steps=3)
    assert here.fingerprint(labs.student_recipe(0, TINY)) != here.fingerprint(labs.student_recipe(0, longer))
    before = here.fingerprint(recipe(here, 0))
    monkeypatch.setattr(labs, "library_digest", lambda: "another library")
    assert here.fingerprint(recipe(here, 0)) != before


def test_the_librarys_digest_follows_its_source_and_not_the_drawings(tmp_path, monkeypatch):
    for name in ("train.py", "cli.py", "studies/report.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(labs, "SOURCE", tmp_path)

    def changed(name: str) -> bool:
        labs.library_digest.cache_clear()
        before = labs.library_digest()
        (tmp_path / name).write_text((tmp_path / name).read_text() + "2")
        labs.library_digest.cache_clear()
        return labs.library_digest() != before

    try:
        assert changed("train.py")
        assert not changed("cli.py")
        assert not changed("studies/report.py")
    finally:
        labs.library_digest.cache_clear()


def test_models_are_trained_once_through_the_recipe_path(tmp_path, monkeypatch):
    import opd.api

    ran: list[str] = []
    run = opd.api.run
    monkeypatch.setattr(opd.api, "run", lambda recipe, **options: ran.append(recipe["name"]) or run(recipe, **options))
    heard: list[str] = []
    lab = Lab(folder=tmp_path, note=heard.append)
    pair = lab.pair(0, TINY)
    assert lab.pair(0, TINY) == pair
    assert ran == ["teacher", "student"]
    assert heard == ["training teacher: teacher", "training student: warm-up"]
    assert (pair.teacher / "model.safetensors").exists()
    assert (pair.student / "model.safetensors").exists()
    assert (tmp_path / lab.fingerprint(labs.teacher_recipe(0, TINY)) / "recipe.yaml").exists()


def test_studies_of_trained_pairs_run_at_a_reduced_size(tmp_path):
    """From training to numbers: what the studies of language models do, on three tiny pairs."""
    lab = Lab(folder=tmp_path)
    batches = [estimators.batch_of(lab, seed, estimators.Size(responses=2, pair=TINY)) for seed in (0, 1, 2)]
    numbers = estimators.measure(batches)
    assert max(numbers.sampled_bias) < 1e-9
    assert len(estimators.judge(numbers)) == 5
    continued = prefixes.measure(lab, prefixes.Size(prompts=3, pair=TINY), temperature=1.0)
    assert list(continued.continued) == list(prefixes.DEPTHS)
    assert all(0 <= share <= 1 for shares in continued.continued.values() for share in shares)


# --- results, page, command -----------------------------------------------------------------------------------------


def outcome(claim: str = "a | b") -> Outcome:
    made, axes = report.figure(1)
    axes[0][0].plot([0, 1], [1, 0])
    one = Finding(claim=claim, citation="2605.11182 eq. 1", measured="x 1 [0, 2]", verdict="does not hold")
    return Outcome(setup="three seeds", findings=(one,), figure=made, table=(("a", "b"), ("1", "2")))


def test_results_are_saved_and_make_the_page(tmp_path):
    image = report.save(tmp_path, "gamma", outcome(), 12.4)
    assert image.read_bytes().startswith(b"\x89PNG")
    results = report.load(tmp_path, ["fixed_points", "gamma"])
    assert list(results) == ["gamma"]
    page = report.page(results, {"gamma": "About gamma"})
    assert "| [gamma](#gamma) | a \\| b | 2605.11182 eq. 1 | x 1 [0, 2] | **does not hold** |" in page
    assert "## gamma\n\nAbout gamma.\n\nthree seeds\n" in page
    assert "| 1 | 2 |" in page
    assert "![gamma](figures/studies/gamma.png)" in page
    assert "\n12 s of CPU time" in page


def test_a_damaged_result_is_an_error(tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "gamma.json").write_text("{")
    with pytest.raises(OSError, match=r"gamma.json cannot be read .* Run `opd study gamma` again"):
        report.load(tmp_path, ["gamma"])


def test_without_matplotlib_nothing_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(STUDIES, "gamma", lambda lab: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=r"matplotlib, which is not installed .*`pip install 'opd\[studies\]'`"):
        CliRunner().invoke(app, ["study", "gamma"], catch_exceptions=False)


def test_the_command_lists_the_studies():
    listed = CliRunner().invoke(app, ["study"], catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(STUDIES)
    assert all(len(line.split()) > 5 for line in listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gama"], r"There is no study 'gama'. Did you mean 'gamma'\? Known: fixed_points"),
        (["gamma", "--all"], r"got both 'gamma' and --all. Name one study, or run all of them"),
    ],
)
def test_what_the_command_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["study", *arguments], catch_exceptions=False)


def test_a_study_from_the_command_to_the_page(tmp_path, monkeypatch):
    """The real study at a reduced size: fewer prompts, and steps enough to arrive."""
    size = privileged.Size(seeds=(0, 1, 2), prompts=4, teachers=4, train_prompts=48, held_out_prompts=32, steps=800)
    monkeypatch.setitem(STUDIES, "privileged", lambda lab: privileged.run(lab, size))
    ended = CliRunner().invoke(app, ["study", "privileged", "--out", str(tmp_path)], catch_exceptions=False)
    assert ended.stdout.count("HOLDS: ") == 3, ended.stdout
    result = json.loads((tmp_path / "studies" / "privileged.json").read_text())
    assert [one["verdict"] for one in result["findings"]] == ["holds"] * 3
    assert "KL(student || geometric mean), nats" in result["findings"][0]["measured"]
    assert (tmp_path / "figures" / "studies" / "privileged.png").stat().st_size > 5000
    assert "## privileged" in (tmp_path / "studies.md").read_text()


def test_the_page_in_docs_is_made_of_the_results_of_all_studies():
    results = report.load(ROOT / "docs", list(STUDIES))
    assert list(results) == list(STUDIES), "run `opd study NAME --out docs` for the missing ones"
    page = (ROOT / "docs" / "studies.md").read_text()
    assert page == report.page(results, {name: headline(name) for name in STUDIES})
    for name in STUDIES:
        assert (ROOT / "docs" / "figures" / "studies" / f"{name}.png").exists()
