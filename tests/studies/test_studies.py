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
from support.study_numbers import collected, first
from support.tiny_pair import TINY
from typer.testing import CliRunner

from opd.cli import app
from opd.errors import ConfigError
from opd_studies import STUDIES, headline, use
from opd_studies.claims import estimators, fixed_points, prefixes, privileged
from opd_studies.lab import ablation, distilling
from opd_studies.lab import lab as labs
from opd_studies.lab.lab import Lab
from opd_studies.page import report
from opd_studies.page.outcome import VERDICTS, Check, Outcome, SeedInterval, differences, finding, over_seeds, short

ROOT = Path(__file__).parents[2]
ARXIV = re.compile(r"\b2\d{3}\.\d{5}\b")


# --- intervals and verdicts -----------------------------------------------------------------------------------------


def student_t_tail(t: float, degrees: int, pieces: int = 20_000) -> float:
    """P(|T| > t), by the trapezium rule on the density, in plain Python."""
    factor = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    height = [factor * (1 + (t * i / pieces) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(pieces + 1)]
    return 1 - 2 * (t / pieces) * (math.fsum(height) - (height[0] + height[-1]) / 2)


@pytest.mark.parametrize("n", [*range(3, 9), 20, 60])
def test_over_seeds_gives_student_t_interval(n):
    values = [math.sin(3 * i) for i in range(n)]
    interval = over_seeds(values)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    assert interval.mean == pytest.approx(mean)
    assert student_t_tail((interval.high - mean) / error, n - 1) == pytest.approx(0.05, abs=2e-4)
    assert interval.high - mean == pytest.approx(mean - interval.low)


@pytest.mark.parametrize("n", [0, 2])
def test_over_seeds_refuses_too_few_seeds(n):
    with pytest.raises(ConfigError, match=f"needs at least 3 seeds, got {n}. Give more seeds"):
        over_seeds([0.0] * n)


def test_differences_pair_seeds():
    assert differences([1.0, 2.0, 3.0], [0.9, 1.9, 2.9]).high == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shorter"):
        differences([1.0, 2.0, 3.0], [1.0, 2.0])


def check(low: float, high: float, at_floor: bool = False, **bounds: float) -> Check:
    return Check(what="x", interval=SeedInterval((low + high) / 2, low, high, at_floor), **bounds)


def test_check_state_depends_on_whole_interval():
    assert check(0.2, 0.4, above=0.1).state == "holds"
    assert check(0.05, 0.4, above=0.1).state == "undecided"
    assert check(0.0, 0.1, above=0.1).state == "contradicted"
    assert check(-0.4, -0.2, below=-0.1).state == "holds"
    assert check(-0.4, 0.0, below=-0.1).state == "undecided"
    assert check(0.1, 0.2, below=-0.1).state == "contradicted"
    assert check(-0.05, 0.05, above=-0.1, below=0.1).state == "holds"
    assert check(-0.05, 0.2, above=-0.1, below=0.1).state == "undecided"
    assert check(0.15, 0.2, above=-0.1, below=0.1).state == "contradicted"
    assert check(math.nan, math.nan, above=-1.0).state == "undecided"
    with pytest.raises(AssertionError, match="cannot fail"):
        check(0.0, 1.0)


def test_check_is_undecided_at_a_floor():
    """Two accuracies of 0 on every seed say nothing; two that differ by seed, but not from each other, do."""
    zero, one, differ = [0.0] * 3, [1.0] * 3, [0.5, 0.6, 0.7]
    for a, b, at_floor in ((zero, zero, True), (one, one, True), (differ, differ, False), (one, zero, False)):
        found = differences(a, b)
        assert found.at_floor is at_floor
        assert found.low == found.high
        stays = Check(what="x", interval=found, above=-0.1)
        assert stays.state == ("undecided" if at_floor else "holds")
        falls = Check(what="x", interval=found, below=-0.1)
        assert falls.state == ("undecided" if at_floor else "contradicted")
        assert ("at the end of its range" in str(stays)) is at_floor
    assert over_seeds(zero).at_floor
    assert not over_seeds([0.0, 0.0, 0.1]).at_floor
    assert not over_seeds([0.5] * 3).at_floor


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("y", "", "holds"),
        ("n", "", "contradicted"),
        ("u", "", "undecided"),
        ("yy", "y", "holds"),
        ("yy", "n", "holds in A only"),
        ("y", "u", "holds in A only"),
        ("yn", "y", "holds in B only"),
        ("yu", "yy", "holds in B only"),
        ("un", "n", "contradicted"),
        ("n", "yu", "contradicted"),
        ("yu", "n", "undecided"),
        ("u", "u", "undecided"),
    ],
)
def test_verdict_of_both_settings(first, second, expected):
    intervals = {"y": (1.0, 2.0), "n": (-2.0, -1.0), "u": (-1.0, 1.0)}
    sides = [[check(*intervals[letter], above=0.0) for letter in letters] for letters in (first, second)]
    assert finding("c", "2605.11182", *sides).verdict == expected
    assert expected in VERDICTS


def test_finding_needs_a_check():
    with pytest.raises(AssertionError, match="without a check cannot fail"):
        finding("c", "2605.11182", [])


def test_finding_states_number_interval_rule_and_settings():
    one = finding("c", "2605.11182", [check(0.1, 0.3, above=0.25)], [check(0.5, 0.7, above=0.25, below=0.9)])
    assert one.measured == (
        "A (undecided): x 0.2 [0.1, 0.3] (claim: above 0.25). "
        "B (holds): x 0.6 [0.5, 0.7] (claim: above 0.25 and below 0.9)"
    )
    assert one.verdict == "holds in B only"
    assert finding("c", "2605.11182", one.checks).measured == "x 0.2 [0.1, 0.3] (claim: above 0.25)"


def test_short_rounds_to_three_digits():
    assert [short(v) for v in (0.0, 0.12345, 1234.5, -1e-7, 3.2e8)] == [
        "0",
        "0.123",
        "1.23e+03",
        "-1.00e-07",
        "3.20e+08",
    ]


# --- every study's rule: numbers as claimed, and their opposite -----------------------------------------------------


NUMBERS, SECOND = collected("NUMBERS"), collected("SECOND")


def module_of(name: str) -> ModuleType:
    return sys.modules[STUDIES[name].__module__]


@pytest.mark.parametrize("name", STUDIES)
def test_studies_name_paper_and_use(name):
    module = module_of(name)
    assert module.__name__ == f"opd_studies.claims.{name}"
    assert headline(name)
    assert re.fullmatch(r"[A-Z`][^\n]{40,300}\.", use(name))
    assert ARXIV.search(module.__doc__ or ""), "the docstring cites the paper"
    for one in module.judge(NUMBERS[name][0]):
        assert ARXIV.search(one.citation)
        assert re.search(
            r"eq\.|Fig\.|section|appendix|A\.\d|Table|abstract|results|ablation|baseline|released code", one.citation
        )


@pytest.mark.parametrize("name", STUDIES)
def test_judge_gives_opposite_verdict_when_numbers_are_opposite(name):
    as_claimed, opposite = NUMBERS[name]
    assert [one.verdict for one in module_of(name).judge(as_claimed) if one.verdict != "holds"] == []
    assert [one.claim for one in module_of(name).judge(opposite) if one.verdict != "contradicted"] == []


@pytest.mark.parametrize("name", SECOND)
def test_judge_gives_setting_b_only_when_first_setting_fails(name):
    numbers, places = SECOND[name]
    verdicts = [one.verdict for one in module_of(name).judge(numbers)]
    assert [place for place, verdict in enumerate(verdicts) if verdict == "holds in B only"] == places


def test_lengths_end_plateau_at_nine_tenths():
    numbers = first.fixed_point_numbers(True)
    near5, near20 = (start.name for start in fixed_points.STARTS[:2])
    assert fixed_points.lengths(numbers, near5) == [20.0] * 3
    assert fixed_points.lengths(numbers, near20) == [150.0] * 3


# --- models, kept by what made them ---------------------------------------------------------------------------------


def test_fingerprint_depends_on_recipe_and_library_not_place(tmp_path, monkeypatch):
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


def test_library_digest_follows_training_source_alone(tmp_path, monkeypatch):
    trains = ("opd/train.py", "opd_studies/worlds/methods.py")
    draws = ("opd/cli.py", "opd/commands/doctor/cost.py", "opd_studies/claims/losses.py", "opd_studies/page/report.py")
    for name in trains + draws:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(labs, "SOURCE", tmp_path)

    def changed(name: str) -> bool:
        labs.library_digest.cache_clear()
        before = labs.library_digest()
        (tmp_path / name).write_text((tmp_path / name).read_text() + "2")
        labs.library_digest.cache_clear()
        return labs.library_digest() != before

    try:
        assert [changed(name) for name in trains] == [True, True]
        assert [changed(name) for name in draws] == [False] * 4
    finally:
        labs.library_digest.cache_clear()


def test_pair_trains_models_once(tmp_path, monkeypatch):
    import opd.api

    ran: list[str] = []
    run = opd.api.run
    monkeypatch.setattr(opd.api, "run", lambda recipe, **options: ran.append(recipe["name"]) or run(recipe, **options))
    heard: list[str] = []
    lab = Lab(folder=tmp_path, workers=1, note=heard.append)
    pair = lab.pair(0, TINY)
    assert lab.pair(0, TINY) == pair
    assert ran == ["teacher-0", "student-0"]
    assert heard == ["training teacher-0", "training student-0"]
    assert (pair.teacher / "model.safetensors").exists()
    assert (pair.student / "model.safetensors").exists()
    assert (tmp_path / lab.fingerprint(labs.teacher_recipe(0, TINY)) / "recipe.yaml").exists()


def test_pairs_equal_single_runs_when_parallel(tmp_path):
    heard: list[str] = []
    lab = Lab(folder=tmp_path, workers=2, note=heard.append)
    pairs = lab.pairs((0, 1), TINY)
    assert sorted(line.split()[-1] for line in heard) == ["student-0", "student-1", "teacher-0", "teacher-1"]
    assert len(lab.cpu) == 4
    assert min(lab.cpu) > 0.01  # seconds of the trainings, which no finished child process has
    alone = Lab(folder=tmp_path / "alone", workers=1).pair(1, TINY)
    assert (alone.student / "model.safetensors").read_bytes() == (pairs[1].student / "model.safetensors").read_bytes()


def test_run_all_raises_the_error_of_a_failed_recipe(tmp_path):
    lab = Lab(folder=tmp_path, workers=2)
    bad = labs.teacher_recipe(0, replace(TINY, task=replace(labs.SORTING, options={"digits": 1})))
    with pytest.raises(ConfigError, match="rows of 1 digits"):
        lab.run_all([bad, labs.student_recipe(0, TINY)])


def test_ablation_measure_gives_numbers_of_each_setting(tmp_path):
    lab = Lab(folder=tmp_path, workers=1)
    size = ablation.Size(seeds=(0,), steps=2, prompts_per_step=4, pair=replace(TINY, task=labs.SORTING))
    settings = {
        "raw": ablation.Setting(method="topk_reverse_kl", options={"k": 2, "form": "raw"}),
        "ours": ablation.Setting(method="opd_studies.worlds.methods:differentiated_log_ratio"),
    }
    numbers = ablation.measure(lab, settings, size)
    assert list(numbers) == [ablation.START, ablation.TEACHER, "raw", "ours"]
    asked_for = set(ablation.HELD_OUT) - {ablation.NUCLEUS}
    assert set(numbers["raw"]) == asked_for | set(ablation.TRAINING)
    assert set(numbers["ours"]) == asked_for | {"entropy", "gradient norm"}
    assert ablation.measure(Lab(folder=tmp_path, note=pytest.fail), settings, size) == numbers
    one = distilling.read(next(tmp_path.glob("*/distil")).parent, "distil")
    entropies = [row["rollout/policy_nll"] for row in one.rows]
    assert len(entropies) == 2
    assert one.last["rollout/policy_nll"] == pytest.approx(sum(entropies) / 2)


def test_estimators_and_prefixes_run_at_reduced_size(tmp_path):
    """From training to numbers: what the studies of language models do, on three tiny pairs."""
    lab = Lab(folder=tmp_path)
    sorters = ablation.Size(steps=1, prompts_per_step=2, pair=replace(TINY, task=labs.SORTING))
    size = estimators.Size(responses=2, pair=TINY, distilled=sorters)
    measured = {"A": estimators.measure(estimators.warmed_up(lab, size))}
    measured["B"] = estimators.measure(estimators.distilled(lab, size))
    assert max(measured["A"].sampled_bias + measured["B"].sampled_bias) < 1e-9
    assert len(estimators.judge(measured)) == 5
    continued = prefixes.measure(lab, prefixes.Size(prompts=3, pair=TINY), temperature=1.0)
    assert list(continued.continued) == list(prefixes.DEPTHS)
    assert all(0 <= share <= 1 for shares in continued.continued.values() for share in shares)


# --- results, page, command -----------------------------------------------------------------------------------------


def outcome(claim: str = "a | b") -> Outcome:
    made, axes = report.figure(1)
    axes[0][0].plot([0, 1], [1, 0])
    one = finding(claim, "2605.11182 eq. 1", [check(0.0, 2.0, above=0.5)], [check(0.0, 0.0, at_floor=True, below=1.0)])
    return Outcome(setup="three seeds", findings=(one,), figure=made, table=(("a", "b"), ("1", "2")))


def test_pages_contain_saved_results(tmp_path):
    image = report.save(tmp_path, "gamma", outcome(), 12.4)
    assert image.read_bytes().startswith(b"\x89PNG")
    results = report.load(tmp_path, ["fixed_points", "gamma"])
    assert list(results) == ["gamma"]
    pages = report.pages(results, {"gamma": "About gamma"}, {"gamma": "Use it."})
    assert list(pages) == ["studies.md", "studies/gamma.md"]
    assert "| [gamma](studies/gamma.md) | Use it. |" in pages["studies.md"]
    assert "| [gamma](studies/gamma.md) | a \\| b | 2605.11182 eq. 1 | **undecided** |" in pages["studies.md"]
    page = pages["studies/gamma.md"]
    assert page.startswith("# gamma\n\nAbout gamma.\n\n**What you do with it.** Use it.\n\n## Setting\n\nthree seeds\n")
    sides = (
        "A (undecided): x 1 [0, 2] (claim: above 0.5). "
        "B (undecided): x 0 [0, 0] (at the end of its range; claim: below 1)"
    )
    assert f"| a \\| b | 2605.11182 eq. 1 | {sides} | **undecided** |" in page
    assert (
        "Of 1 claims: 0 holds, 0 holds in A only, 0 holds in B only, 0 contradicted, 1 undecided."
        in pages["studies.md"]
    )
    assert "| 1 | 2 |" in page
    assert "![gamma: means and 95 % intervals beside the thresholds of 1 claims: 1 undecided]" in page
    assert "![gamma: About gamma](../figures/studies/gamma.png)" in page
    assert "\n12 s of CPU time" in page


def test_load_raises_os_error_when_result_is_damaged(tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "gamma.json").write_text("{")
    with pytest.raises(OSError, match=r"gamma.json cannot be read .* Run `opd study gamma` again"):
        report.load(tmp_path, ["gamma"])


@pytest.mark.parametrize("findings", [[{"claim": "c", "citation": "d", "verdict": "holds"}], ["holds"], None])
def test_load_raises_os_error_when_findings_have_no_numbers(tmp_path, findings):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "gamma.json").write_text(json.dumps({"findings": findings}))
    with pytest.raises(OSError, match=r"gamma.json has findings without the numbers .* Run `opd study gamma` again"):
        report.load(tmp_path, ["gamma"])


def test_how_many_counts_verdicts_and_chance():
    text = report.how_many(["holds"] * 60 + ["contradicted"] * 44)
    assert text.startswith(
        "Of 104 claims: 60 holds, 0 holds in A only, 0 holds in B only, 44 contradicted, 0 undecided."
    )
    assert "about 5 of 104 verdicts may be chance" in text


def test_opd_study_pages_follow_numbers_in_results(tmp_path):
    report.save(tmp_path, "gamma", outcome(), 12.4)
    command = ["study", "--pages", "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, command, catch_exceptions=False)
    assert ended.stdout.split() == [str(tmp_path / name) for name in ("studies.md", "studies/gamma.md")]
    assert "**undecided**" in (tmp_path / "studies.md").read_text()
    numbers = tmp_path / "studies" / "gamma.json"
    result = json.loads(numbers.read_text())
    result["findings"][0]["A"][0]["low"] = 0.75
    numbers.write_text(json.dumps(result))
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert "**holds in A only**" in (tmp_path / "studies.md").read_text()
    assert "x 1 [0.75, 2]" in (tmp_path / "studies" / "gamma.md").read_text()
    with pytest.raises(ConfigError, match=r"has no results of a study .* opd study NAME --out"):
        CliRunner().invoke(app, ["study", "--pages", "--out", str(tmp_path / "x")], catch_exceptions=False)


def test_opd_study_names_extra_when_matplotlib_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(STUDIES, "gamma", lambda lab: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=r"matplotlib, which is not installed .*`pip install 'opd\[studies\]'`"):
        CliRunner().invoke(app, ["study", "gamma"], catch_exceptions=False)


def test_opd_study_lists_studies():
    listed = CliRunner().invoke(app, ["study"], catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(STUDIES)
    assert all(len(line.split()) > 5 for line in listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gama"], r"There is no study 'gama'. Did you mean 'gamma'\? Known: fixed_points"),
        (["gamma", "--all"], r"got both 'gamma' and --all. Name one study, or run all of them"),
        (["gamma", "--pages"], r"got --pages and 'gamma'. --pages runs no study"),
        (["--all", "--pages"], r"got --pages and --all. --pages runs no study"),
    ],
)
def test_opd_study_refuses_unknown_name_or_name_with_all(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["study", *arguments], catch_exceptions=False)


def test_opd_study_writes_result_figure_and_page(tmp_path, monkeypatch):
    """The real study at a reduced size: fewer prompts, and steps enough to arrive."""
    size = privileged.Size(seeds=(0, 1, 2), prompts=4, teachers=4, train_prompts=48, held_out_prompts=32, steps=800)
    monkeypatch.setitem(STUDIES, "privileged", lambda lab: privileged.run(lab, size))
    ended = CliRunner().invoke(app, ["study", "privileged", "--out", str(tmp_path)], catch_exceptions=False)
    assert ended.stdout.count("HOLDS: ") == 3, ended.stdout
    result = json.loads((tmp_path / "studies" / "privileged.json").read_text())
    assert [one["A"][0]["what"] for one in result["findings"]] == [
        "KL(student || geometric mean), nats",
        "kept, shared",
        "kept on held-out prompts, shared",
    ]
    assert (tmp_path / "figures" / "studies" / "privileged.png").stat().st_size > 5000
    assert "[privileged](studies/privileged.md)" in (tmp_path / "studies.md").read_text()
    assert "# privileged" in (tmp_path / "studies" / "privileged.md").read_text()


def test_pages_in_docs_equal_those_of_results():
    docs = ROOT / "docs"
    results = report.load(docs, list(STUDIES))
    assert list(results) == list(STUDIES), "run `opd study NAME --out docs` for the missing ones"
    made = report.pages(results, {name: headline(name) for name in STUDIES}, {name: use(name) for name in STUDIES})
    written = [docs / "studies.md", *sorted((docs / "studies").glob("*.md"))]
    assert {file.relative_to(docs).as_posix(): file.read_text() for file in written} == made
    for name, page in made.items():
        assert "?.\n" not in page, "a question is no sentence with a full stop"
        for link in re.findall(r"\]\(([^)#]+)", page):
            assert ((docs / name).parent / link).exists(), link
