"""Two runs on the same held-out prompts; what cannot be paired is said with the reason."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest
from support.run_folders import write
from support.runs import command

from opd.errors import ConfigError
from opd.viewer.compare import as_json, compare, content_of
from opd.viewer.content import Options
from opd.viewer.keys import differing
from opd.viewer.pack import opened


@pytest.fixture
def runs(tmp_path):
    one = write(tmp_path / "one", prompts=30)
    two = write(tmp_path / "two", prompts=30, seed=1, gain=0.3, extra={"prompts_per_step": 32})
    return one, two


def rewards(side, setting):
    rows = side.stage.held_out(side.when, ["sampling", "reward"])
    return [r for name, r in zip(rows.values("sampling"), rows.values("reward"), strict=True) if name == setting]


def test_compare_pairs_the_same_prompts(runs):
    found = compare(runs)
    row = found.rows[0]
    a, b = (rewards(side, "greedy") for side in found.sides)
    assert row.pair is not None
    assert row.pair.difference.mean == pytest.approx(np.mean(b) - np.mean(a))
    only = sum(x > y for x, y in zip(a, b, strict=True)), sum(y > x for x, y in zip(a, b, strict=True))
    assert (row.pair.only_first, row.pair.only_second) == only
    assert row.pair.p == pytest.approx(binomtest(only[0], sum(only), 0.5).pvalue)
    assert found.reasons == []


def test_compare_lists_keys_that_differ_alone(runs):
    assert compare(runs).keys == [("seed", ["0", "1"]), ("stages.distil.prompts_per_step", ["", "32"])]


def test_differing_names_versions_and_nested_keys():
    recipes = [{"stages": [{"name": "a", "optimizer": {"learning_rate": rate}}], "name": str(rate)} for rate in (1, 2)]
    environments = [{"packages": {"torch": version}} for version in ("2.9", "2.13")]
    assert differing(recipes, environments) == [
        ("stages.a.optimizer.learning_rate", ["1", "2"]),
        ("environment.torch", ["2.9", "2.13"]),
    ]


def test_prompts_of_equal_words_are_told_apart_by_their_images(tmp_path):
    """Each picture is a prompt of its own in pairs, means and intervals."""
    made = {"prompts": 10, "pictures": (16, 16), "hostile": ("red",)}
    found = compare([write(tmp_path / "one", **made), write(tmp_path / "two", seed=1, **made)])
    assert {row.pair.prompts for row in found.rows if row.pair is not None} == {10}
    row, own = found.rows[0], [rewards(side, "greedy") for side in found.sides]
    assert [mean.mean for mean in row.means if mean is not None] == [pytest.approx(np.mean(one)) for one in own]


def test_compare_says_that_no_prompt_is_shared(tmp_path):
    one = write(tmp_path / "one", prompts=10)
    two = write(tmp_path / "two", prompts=10, hostile=("another prompt",))
    found = compare([one, two])
    assert [row.pair for row in found.rows] == [None, None]
    assert "greedy: not paired, because no held-out prompt is in both runs; each has its own." in found.reasons
    assert all(mean is not None for row in found.rows for mean in row.means)
    assert compare([one, two], by="id").rows[0].pair is not None


def test_compare_does_not_pair_other_rewards(tmp_path):
    found = compare([write(tmp_path / "one"), write(tmp_path / "two", reward="exact")])
    assert found.rows[0].pair is None
    assert "greedy: not paired, because the rewards differ (A max_words, B exact)." in found.reasons
    assert "held" not in content_of(found, Options()).blocks


def test_compare_says_how_many_prompts_are_shared(tmp_path):
    found = compare([write(tmp_path / "one", prompts=10), write(tmp_path / "two", prompts=14)])
    assert "greedy: 10 prompts are in both runs, of 10 and 14." in found.reasons


def test_compare_of_three_runs_has_no_pairs(tmp_path):
    found = compare([write(tmp_path / name, seed=n) for n, name in enumerate("xyz")])
    assert [side.label for side in found.sides] == ["A", "B", "C"]
    assert all(row.pair is None and len(row.means) == 3 for row in found.rows)
    assert "held" not in content_of(found, Options()).blocks


def test_content_of_comparison_has_both_responses(runs):
    content = content_of(compare(runs), Options())
    head, _ = opened(content.blocks["held"])
    assert len(head["groups"]) == 60
    assert all(set(group["rows"]) == {"A", "B"} for group in head["groups"])
    for group in head["groups"]:
        a, b = (head["rows"][group["rows"][label]] for label in "AB")
        assert head["texts"][a["prompt"]] == head["texts"][b["prompt"]]


@pytest.mark.parametrize(
    ("stage", "by", "message"),
    [("x", "prompt", "not all a stage 'x'.*--stage"), (None, "promt", "Did you mean 'prompt'")],
)
def test_compare_refuses_unknown_names(runs, stage, by, message):
    with pytest.raises(ConfigError, match=message):
        compare(runs, stage, by)


def test_compare_refuses_a_single_run(runs):
    with pytest.raises(ConfigError, match="needs 2 to 26 runs, got 1"):
        compare(runs[:1])


def test_opd_compare_prints_table_and_json(runs):
    shown = command("compare", *map(str, runs))
    assert shown.code == 0, shown.err
    assert "p = " in shown.out
    assert "stages.distil.prompts_per_step" in shown.out
    printed = command("compare", *map(str, runs), "--json")
    found = json.loads(printed.out)
    assert [run["label"] for run in found["runs"]] == ["A", "B"]
    assert found["rows"][0]["paired"]["prompts"] == 30


def test_json_of_a_single_prompt_has_no_ends(tmp_path):
    one, two = (write(tmp_path / n, prompts=1, shares=False, gain=5, extra={"steps": int(n)}) for n in "12")
    row = json.loads(as_json(compare([one, two])))["rows"][0]
    assert row["paired"]["prompts"] == 1
    for found in (*row["runs"], row["paired"]["difference"]):
        assert (found["low"], found["high"]) == (None, None)
        assert np.isfinite(found["mean"])


def test_opd_compare_writes_no_control_characters(tmp_path):
    hostile = ("\x1b[31mred\x07", "\u202eevil")
    one, two = (write(tmp_path / n, hostile=hostile, reward="\x1b[2J", tasks=("t",), seed=n == "b") for n in "ab")
    shown = command("compare", str(one), str(two))
    assert shown.code == 0, shown.err
    assert "\u2039U+001B\u203a[2J" in shown.out
    assert not set(shown.out) & {"\x1b", "\x07", "\u202e"}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {"seed": 1}, ["seed 0", "seed 1"]),
        ({}, {"extra": {"prompts_per_step": 32}}, ["no prompts_per_step", "prompts_per_step 32"]),
        ({"name": "a"}, {"name": "b", "seed": 1}, ["", ""]),
        ({}, {"seed": 1, "extra": {"options": {"k": 2}, "steps": 9}}, ["one", "two"]),
        ({}, {"extra": {"options": {"texts": "x" * 50}}}, ["one", "two"]),
        ({}, {}, ["one", "two"]),
    ],
)
def test_runs_of_one_name_are_told_apart(tmp_path, first, second, expected):
    found = compare([write(tmp_path / "one", **first), write(tmp_path / "two", **second)])
    assert [side.apart for side in found.sides] == expected


def test_folders_of_one_name_get_their_parents(tmp_path):
    found = compare([write(tmp_path / name / "run") for name in "ab"])
    assert [side.name for side in found.sides] == ["fake (a/run)", "fake (b/run)"]
    assert [side.name for side in compare([tmp_path / "a/run"] * 2).sides] == [
        "fake (run)"
    ] * 2  # no path of the machine


def test_comparison_without_rows_or_keys_has_no_empty_table(tmp_path):
    """Two runs of one recipe that measured nothing had two tables of headings, one of them named ` on held-out`."""
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    out = command("compare", str(one), str(two), "--between", "runs").out
    assert "No key of the recipes or environments differs." in out
    assert "max_words on held-out prompts" in out
    for folder in (one, two):
        (folder / "distil" / "held_out_step_000020.parquet").unlink()
    out = command("compare", str(one), str(two), "--between", "runs").out
    assert "on held-out prompts" not in out
    assert "A has no responses of an evaluation after training." in out
    assert "key  " not in out
