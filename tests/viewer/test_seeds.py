"""Means over seeds and their differences, against values computed by hand; what is not compared is named."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from support.run_folders import FakeRun, recipe_of, write
from support.runs import command

from opd.errors import ConfigError, RunError
from opd.viewer.groups import between_of
from opd.viewer.read import read_run
from opd.viewer.seeds import as_json, over_seeds

T2 = 4.302653  # the 97.5 % quantile of Student's t, 2 degrees of freedom: any printed table
OTHER = {"prompts_per_step": 32}  # makes another recipe


def measured(folder, values, when="after", setting="greedy", stage="distil", steps=20, key="reward"):
    """Put a held-out number, by run, into the metrics of runs."""
    for name, value in values.items():
        file = folder / name / stage / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        row = rows[-1 if when == "after" else 0]
        assert row["step"] == (steps if when == "after" else 0)
        row["/".join(filter(None, ("eval", "teacher" if when == "teacher" else "", setting, key)))] = value
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))


def runs(folder, label, rewards, **changes):
    """The folders of runs of one recipe, with the greedy reward after training by seed."""
    made = [write(folder / f"{label}{seed}", name=label, seed=seed, **changes) for seed in rewards]
    measured(folder, {f"{label}{seed}": reward for seed, reward in rewards.items()})
    return made


def compared(folders, between="recipes", stage=None, against=None, by="prompt"):
    return over_seeds([read_run(folder) for folder in folders], between, stage, against, by)


def lines(found, setting="greedy", key="reward"):
    (table,) = [table for table in found.tables if (table.setting, table.key) == (setting, key)]
    return {line.entry.name: line for line in table.lines}


def ends(one):
    return pytest.approx((one.mean, one.low, one.high), abs=1e-6)


def test_recipes_have_mean_and_paired_difference(tmp_path):
    one = runs(tmp_path, "a", {0: 0.5, 1: 0.6, 2: 0.7})
    two = runs(tmp_path, "b", {2: 0.7, 0: 0.6, 1: 0.8}, extra=OTHER)
    found = compared([*one, *two])
    assert [(group.label, group.name, list(group.runs)) for group in found.groups] == [
        ("A", "a", [0, 1, 2]),
        ("B", "b", [0, 1, 2]),
    ]
    rows = lines(found)
    half = T2 * 0.1 / math.sqrt(3)  # the standard deviation of .5, .6, .7 and of the gains .1, .2, 0 is .1
    assert ends(rows["A"].mean) == (0.6, 0.6 - half, 0.6 + half)
    assert ends(rows["B"].mean) == (0.7, 0.7 - half, 0.7 + half)
    assert ends(rows["B"].difference) == (0.1, 0.1 - half, 0.1 + half)
    assert (rows["B"].pairing, rows["A"].difference) == ("paired", None)
    assert rows["B"].values == {0: 0.6, 1: 0.8, 2: 0.7}
    assert found.keys == [("stages.distil.prompts_per_step", ["", "32"])]
    assert found.reasons == []
    assert "A seed draws the order of prompts and the sampling." in found.covers


def test_other_seeds_are_not_paired_but_welch(tmp_path):
    one = runs(tmp_path, "a", {0: 0.1, 1: 0.2, 2: 0.3})
    two = runs(tmp_path, "b", {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8}, extra=OTHER)
    found = compared([*one, *two])
    row = lines(found)["B"]
    # Variances of the means 1/300 and 5/300, so 4 * 54 / 53 = 4.08 degrees of freedom: t from 2.571 (5) to 2.776 (4).
    assert row.pairing == "Welch"
    assert row.difference.mean == pytest.approx(0.3)
    assert 2.571 < (row.difference.high - 0.3) / math.sqrt(6 / 300) < 2.776
    assert found.reasons == [
        "B and A: differences are not paired by seed (Welch), because B alone has seed 3.",
    ]


def test_stages_are_compared_within_runs(tmp_path):
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.6, 2: 0.7}, stages=("distil", "more"))
    measured(tmp_path, {"a0": 0.1, "a1": 0.3, "a2": 0.2}, when="before")
    measured(tmp_path, {"a0": 0.9, "a1": 0.9, "a2": 0.9}, when="teacher")
    measured(tmp_path, {"a0": 0.4, "a1": 0.6, "a2": 0.8}, stage="more")
    found = compared(made, "stages")
    rows = lines(found)
    assert list(rows) == ["distil, before", "distil, teacher", "distil", "more, before", "more, teacher", "more"]
    assert found.baseline.name == "distil, before"
    half = T2 * 0.1 / math.sqrt(3)  # gains .4, .3, .5
    assert ends(rows["distil"].difference) == (0.4, 0.4 - half, 0.4 + half)
    assert ends(rows["distil, teacher"].mean) == (0.9, 0.9, 0.9)
    other = lines(compared(made, "stages", against="distil"))
    assert ends(other["more"].difference) == (0.0, -half, half)  # -.1, 0, .1
    assert lines(compared(made, "stages", stage="more")).keys() == {"more, before", "more, teacher", "more"}


def test_stages_of_several_recipes_have_their_labels(tmp_path):
    one = runs(tmp_path, "a", {0: 0.5, 1: 0.6})
    two = runs(tmp_path, "b", {0: 0.6, 1: 0.8}, extra=OTHER)
    found = compared([*one, *two], "stages", against="A distil")
    assert lines(found)["B distil"].difference.mean == pytest.approx(0.15)
    assert [entry.name for entry in found.entries] == [
        f"{label} distil{when}" for label in "AB" for when in (", before", ", teacher", "")
    ]


def test_divergences_and_pass_at_have_tables(tmp_path):
    evaluate = recipe_of(FakeRun())["stages"][0]["evaluate"] | {"pass_at": [1, 4]}
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.6}, extra={"evaluate": evaluate})
    measured(tmp_path, {"a0": 0.8, "a1": 0.9}, key="pass@4")
    found = compared(made)
    assert [(table.setting, table.key) for table in found.tables] == [
        *(("greedy", "reward"), ("greedy", "pass@4"), ("sampled", "reward"), ("", "reverse_kl"), ("", "forward_kl")),
    ]
    assert lines(found, key="pass@4")["A"].mean.mean == pytest.approx(0.85)
    assert lines(found, "", "reverse_kl")["A"].mean.mean == pytest.approx(0.4)


def test_counts_of_the_environment_have_tables(tmp_path):
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.6})
    for key, values in (
        ("turns", {"a0": 3.0, "a1": 4.0}),
        ("won", {"a0": 0.2, "a1": 0.4}),
        ("done", {"a0": 1, "a1": 1}),
    ):
        measured(tmp_path, values, key=f"environment/{key}")
    found = compared(made)
    assert [table.key for table in found.tables if table.setting == "greedy"] == ["reward", "environment/won"]
    assert lines(found, key="environment/won")["A"].values == {0: 0.2, 1: 0.4}


def test_one_seed_has_no_interval(tmp_path):
    made = [*runs(tmp_path, "a", {0: 0.5}), *runs(tmp_path, "b", {0: 0.75}, extra=OTHER)]
    found = compared(made)
    assert lines(found)["B"].difference.mean == 0.25
    assert "there is no interval over seeds" in found.covers
    row = json.loads(as_json(found))["tables"][0]["rows"][1]
    assert row["difference"] == {"mean": 0.25, "low": None, "high": None}


def test_json_has_values_by_seed(tmp_path):
    made = [*runs(tmp_path, "a", {0: 0.5, 1: 0.6}), *runs(tmp_path, "b", {0: 0.5, 1: 0.8}, extra=OTHER)]
    found = json.loads(as_json(compared(made)))
    assert found["against"] == "A"
    assert found["groups"][1]["runs"] == [{"seed": seed, "folder": str(tmp_path / f"b{seed}")} for seed in (0, 1)]
    row = found["tables"][0]["rows"][1]
    assert (row["name"], row["stage"], row["when"]) == ("B", "distil", "after")
    assert (row["seeds"], row["pairing"]) == ({"0": 0.5, "1": 0.8}, "paired")
    assert row["difference"]["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("seeds", "recipes", "expected"),
    [
        ((0, 1), (1, 1), "stages"),
        ((0, 1, 0, 1), (1, 1, 2, 2), "recipes"),
        ((0, 1, 5), (1, 1, 2), "recipes"),
        ((0, 1), (1, 2), "runs"),
        ((0, 0), (1, 1), "runs"),
    ],
)
def test_default_follows_seeds_and_recipes(tmp_path, seeds, recipes, expected):
    made = [
        write(tmp_path / str(i), seed=seed, name=f"run {i}", extra={"prompts_per_step": recipe})
        for i, (seed, recipe) in enumerate(zip(seeds, recipes, strict=True))
    ]
    assert between_of([read_run(folder) for folder in made], None) == expected


def test_one_seed_twice_is_refused(tmp_path):
    made = [*runs(tmp_path, "a", {0: 0.5, 1: 0.5}), write(tmp_path / "again", name="other name", seed=1)]
    with pytest.raises(ConfigError, match=r"a1 and .*again have one recipe and one seed, 1: .*--between runs"):
        compared(made)


def test_run_that_has_not_finished_is_refused(tmp_path):
    made = [*runs(tmp_path, "a", {0: 0.5, 1: 0.5}, stages=("distil", "more"))]
    (tmp_path / "a1" / "more" / "done.json").unlink()
    with pytest.raises(RunError, match=r"not all have finished \(.*a1, stage 'more': 20 of 20 steps\).*--stage"):
        compared(made, "stages")
    assert lines(compared(made, "stages", stage="distil"))["distil"].mean is not None
    assert lines(compared(made, stage="distil"))["A"].mean is not None


def test_stage_that_has_not_begun_is_refused(tmp_path):
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.5}, stages=("distil", "more"))
    for file in sorted((tmp_path / "a1" / "more").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    with pytest.raises(RunError, match=r"a1, stage 'more': 0 of 20 steps"):
        compared(made)


def test_other_rows_have_no_mean_and_no_difference(tmp_path):
    made = [write(tmp_path / "a0", seed=0, prompts=10), write(tmp_path / "a1", seed=1, prompts=12)]
    found = compared(made)
    assert lines(found)["A"].mean is None
    differ = f"the held-out rows of {tmp_path / 'a0'} and {tmp_path / 'a1'} differ: 10 are in both, of 10 and 12"
    assert f"A, greedy: no mean, because {differ}." in found.reasons
    one = runs(tmp_path, "c", {0: 0.5, 1: 0.6})
    two = runs(tmp_path, "d", {0: 0.5, 1: 0.6}, prompts=14, extra=OTHER)
    found = compared([*one, *two])
    assert lines(found)["B"].mean is not None
    assert lines(found)["B"].difference is None
    differ = "the held-out rows of B and A differ: 12 are in both, of 14 and 12"
    assert f"B, greedy: no difference from A, because {differ}." in found.reasons


def test_rows_may_be_told_apart_by_place(tmp_path):
    made = [write(tmp_path / f"a{seed}", seed=seed, hostile=(f"prompt {seed}",)) for seed in (0, 1)]
    assert lines(compared(made))["A"].mean is None
    assert lines(compared(made, by="id"))["A"].mean is not None


def test_teacher_has_the_rows_of_the_student_with_images(tmp_path):
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.6}, pictures=(16, 16))
    assert lines(compared(made, "stages"))["distil, teacher"].difference is not None


def test_files_that_are_gone_have_no_mean(tmp_path):
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.6})
    (tmp_path / "a1" / "distil" / "held_out_step_000020.parquet").unlink()
    found = compared(made)
    assert lines(found)["A"].mean is None
    assert "without the file of the responses of" in found.reasons[0]


@pytest.mark.parametrize(
    ("section", "change", "why"),
    [
        ("sampling", {"greedy": {"temperature": 0.5}}, "sampling.greedy.temperature is 0.5 and 0.0"),
        ("reward", {"name": "max_words", "options": {"n": 6}}, "reward.options.n is 6 and 5"),
        (
            "reward",
            {"name": "max_words", "options": {"a": 1, "b": 2, "c": 3, "d": 4}},
            "reward.options.a is 1 and not set, reward.options.b is 2 and not set, reward.options.c is 3 and not set, "
            "2 more keys differ",
        ),
    ],
)
def test_other_conditions_have_no_difference(tmp_path, section, change, why):
    evaluate = recipe_of(FakeRun())["stages"][0]["evaluate"] | {section: change}
    one = runs(tmp_path, "a", {0: 0.5, 1: 0.6})
    found = compared([*one, *runs(tmp_path, "b", {0: 0.5, 1: 0.6}, extra={"evaluate": evaluate})])
    assert lines(found)["B"].mean is not None
    assert lines(found)["B"].difference is None
    assert f"B, greedy: no difference from A, because {why}." in found.reasons


def test_number_of_samples_and_failures_allowed_may_differ(tmp_path):
    evaluate = recipe_of(FakeRun())["stages"][0]["evaluate"]
    evaluate["sampling"]["greedy"]["n"] = 4
    evaluate["reward"]["on_error"] = "zero"
    one = runs(tmp_path, "a", {0: 0.5, 1: 0.6}, extra={"evaluate": evaluate})
    found = compared([*one, *runs(tmp_path, "b", {0: 0.6, 1: 0.7})])
    assert lines(found)["B"].difference is not None


LEARNER = {"name": "learn", "train": "teacher", "method": "sft", "steps": 9}
TAUGHT = {"models": {"teacher": {"from_stage": "make"}}, "stages": [LEARNER | {"name": "make", "train": "model"}]}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"models": {"teacher": {"path": "another"}}}),
        ({"stages": [LEARNER]}, {"stages": [LEARNER | {"steps": 10}]}),
        (TAUGHT, {**TAUGHT, "models": {"teacher": {"from_stage": "make"}, "model": {"path": "another"}}}),
        (TAUGHT, {**TAUGHT, "stages": [LEARNER | {"name": "make", "train": "model", "steps": 10}]}),
    ],
)
def test_divergences_of_other_teachers_have_no_difference(tmp_path, first, second):
    made: list[Path] = []
    for label, keys in (("a", first), ("b", second)):
        for folder in runs(tmp_path, label, {0: 0.5, 1: 0.6}):
            recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
            stages = [*keys.get("stages", []), *recipe["stages"]]
            (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **keys, "stages": stages}))
            made.append(folder)
    found = compared(made)
    assert lines(found, "", "reverse_kl")["B"].difference is None
    assert lines(found)["B"].difference is not None
    assert "B, reverse_kl: no difference from A, because the divergences are from different teachers." in found.reasons


def test_divergences_of_one_teacher_have_a_difference(tmp_path):
    stages = [LEARNER, recipe_of(FakeRun())["stages"][0]]
    found = []
    for label, more in (("a", {}), ("b", {"options": {"k": 2}})):
        for folder in runs(tmp_path, label, {0: 0.5, 1: 0.6}):
            recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
            own = [{**stages[0], "samples_every": 5 if more else 10}, stages[1] | more]
            (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": own}))
            found.append(folder)
    measured(tmp_path, {"b0": 0.1, "b1": 0.2}, setting="", key="reverse_kl")
    assert lines(compared(found), "", "reverse_kl")["B"].difference.mean == pytest.approx(-0.25)


def test_runs_that_are_unlike_are_named(tmp_path):
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.6})
    for folder, rows in zip(made, ("4 rows, 1f", "4 rows, 2e"), strict=True):
        (folder / "inputs.json").write_text(json.dumps({"distil": {"training rows": rows}}))
    environment = json.loads((made[0] / "environment.json").read_text())
    environment["packages"]["torch"] = "2.9"
    (made[0] / "environment.json").write_text(json.dumps(environment))
    change = {"at": "now", "key": "stages.distil.optimizer.learning_rate", "before": 1, "after": 2, "effect": "numbers"}
    (made[1] / "changes.jsonl").write_text(json.dumps(change) + "\n" + json.dumps(change | {"effect": "none"}) + "\n")
    assert compared(made).reasons == [
        "A: environment.torch differs between its runs (2.9, 2.13.0).",
        "A: not the same in all its runs: training rows of stage distil.",
        f"A: {made[1]} went on with accepted changes (stages.distil.optimizer.learning_rate).",
    ]


def test_number_that_a_run_lacks_has_no_mean(tmp_path):
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.6})
    file = tmp_path / "a1" / "distil" / "metrics.jsonl"
    file.write_text(file.read_text().replace("eval/greedy/reward", "eval/greedy/other"))
    found = compared(made)
    assert lines(found)["A"].mean is None
    assert f"A, greedy: no mean, because {tmp_path / 'a1'} did not measure it." in found.reasons


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "distill"}, r"a stage 'distill' \(A: distil\).*Did you mean 'distil'"),
        ({"against": "a"}, "Differences from 'a' .*There are: A"),
    ],
)
def test_unknown_names_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        compared(runs(tmp_path, "a", {0: 0.5, 1: 0.6}), **options)


def test_opd_compare_prints_tables_over_seeds(tmp_path):
    one = runs(tmp_path, "a", {0: 0.5, 1: 0.6, 2: 0.7})
    two = runs(tmp_path, "b", {0: 0.6, 1: 0.8, 2: 0.7}, extra=OTHER)
    folders = list(map(str, (*one, *two)))
    shown = command("compare", *folders)
    assert shown.code == 0, shown.err
    assert f"A  a, distil, seeds 0, 1, 2: {', '.join(folders[:3])}\n" in shown.out
    assert re.search(r"A  a +3 +0\.600 \[0\.352, 0\.848\] *\n", shown.out)
    assert re.search(r"B  b +3 +0\.700 \[0\.452, 0\.948\] +\+0\.100 \[-0\.148, \+0\.348\]", shown.out)
    assert "paired by seed" in shown.out
    assert "Student's t over seeds" in shown.out
    assert "max_words on held-out prompts" in command("compare", *folders, "--between", "runs").out
    assert json.loads(command("compare", *folders, "--json").out)["between"] == "recipes"
    swapped = command("compare", *folders, "--against", "B").out
    assert re.search(r"A  a .* -0\.100 \[-0\.348, \+0\.148\]", swapped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--between", "seeds"), "between runs, recipes or stages, not 'seeds'"),
        (("--between", "runs", "--against", "A"), "--against names a row of a comparison over seeds"),
    ],
)
def test_opd_compare_refuses_options_that_do_not_fit(tmp_path, options, message):
    made = runs(tmp_path, "a", {0: 0.5, 1: 0.6})
    shown = command("compare", *map(str, made), *options)
    assert shown.code != 0
    assert message in " ".join(shown.err.split())


def test_tables_over_seeds_write_no_control_characters(tmp_path):
    hostile = {"hostile": ("\x1b[31mred\x07",), "reward": "\x1b[2J", "tasks": ("\u202et",)}
    made = [write(tmp_path / str(seed), seed=seed, name="\x1b]0;x", **hostile) for seed in range(2)]
    shown = command("compare", *map(str, made))
    assert shown.code == 0, shown.err
    assert "\u2039U+001B\u203a[2J" in shown.out
    assert not set(shown.out) & {"\x1b", "\x07", "\u202e"}


def test_page_has_tables_over_seeds_and_of_runs(tmp_path):
    one = runs(tmp_path, "a", {0: 0.5, 1: 0.6, 2: 0.7})
    two = runs(tmp_path, "b", {0: 0.6, 1: 0.8, 2: 0.7}, extra=OTHER)
    out = tmp_path / "page.html"
    shown = command("compare", *map(str, (*one, *two)), "-o", str(out))
    assert shown.code == 0, shown.err
    page = out.read_text()
    assert "<h3>Over seeds</h3>" in page
    assert "+0.100<small>-0.148 to +0.348</small>" in page
    assert page.count('<th scope="row">greedy: max_words</th>') == 1  # the runs side by side
    assert command("report", *map(str, one), "-o", str(out)).code == 0
    assert "<h3>Over seeds</h3>" not in out.read_text()
