"""Tasks made on the spot: right answers, and parts that never share a row."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from opd.data.toy import addition, sorting, sums
from opd.errors import ConfigError


def test_addition_gives_right_sums_and_columns():
    rows = list(addition(count=200, digits=2, seed=1))
    assert rows[0] == {"prompt": "52+56=", "response": "2+6+0=08,5+5+0=10;108", "answer": "108"}
    for row in rows:
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert int(row["answer"]) == a + b
        columns, answer = row["response"].split(";")
        assert answer == row["answer"]
        for column in columns.split(","):
            digits, total = column.split("=")
            assert sum(map(int, digits.split("+"))) == int(total)


def test_sums_are_conversations_of_right_calls():
    rows = list(sums(count=300, seed=1))
    assert {row["prompt"].count("+") for row in rows} == {2, 3, 4}
    for row in rows:
        digits = [int(digit) for digit in row["prompt"].rstrip("=").split("+")]
        calls = re.findall(r"\[(\d+)\+(\d+)\](\d+?)(?=\[|" + row["answer"] + "$)", row["response"])
        assert [int(b) for _, b, _ in calls] == digits[1:]
        assert [int(c) for _, _, c in calls] == [int(a) + int(b) for a, b, _ in calls]
        assert [int(a) for a, _, _ in calls] == [digits[0], *(int(c) for _, _, c in calls[:-1])]
        assert int(row["answer"]) == sum(digits) == int(calls[-1][2])
        assert "".join(f"[{a}+{b}]{c}" for a, b, c in calls) + row["answer"] == row["response"]


@pytest.mark.parametrize(("descending", "sign"), [(False, ">"), (True, "<")])
def test_sorting_gives_sorted_answers(descending: bool, sign: str):
    for row in sorting(count=300, digits=5, descending=descending):
        assert len(row["prompt"]) == 6
        assert row["prompt"][-1] == sign
        up = sorted(row["prompt"][:-1])
        assert list(row["answer"]) == (up[::-1] if descending else up)
        assert row["response"] == row["answer"]


def test_sorting_gives_equal_rows_in_both_directions():
    up, down = sorting(count=50, seed=3), sorting(count=50, seed=3, descending=True)
    assert [row["prompt"][:-1] for row in up] == [row["prompt"][:-1] for row in down]


def test_sorting_puts_solution_in_given_share_of_prompts():
    rows = list(sorting(count=400, knowing=0.25, seed=5))
    plain = list(sorting(count=400, seed=5))
    shown = [";" in row["prompt"] for row in rows]
    assert 0.18 < sum(shown) / 400 < 0.32  # 3.2 standard errors
    for row, other, knows in zip(rows, plain, shown, strict=True):
        assert row == {**other, "prompt": (other["answer"] + ";") * knows + other["prompt"]}


@pytest.mark.parametrize(("task", "most"), [(addition, 3000), (sorting, 3000), (sums, 3000)])
def test_addition_and_sorting_parts_share_no_row(task: Callable[..., object], most: int):
    train = [row["prompt"] for seed in (0, 1) for row in task(count=most, seed=seed, part="train")]  # type: ignore[attr-defined]
    held_out = [row["prompt"] for seed in (0, 1) for row in task(count=most // 2, seed=seed, part="held_out")]  # type: ignore[attr-defined]
    assert not set(train) & set(held_out)
    assert len(set(train[:most])) == most
    assert train[:most] != train[most:]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (addition, "held_out has about 810 sums of 2 digits; 500 are too many"),
        (sorting, "held_out has about 10 rows of 2 digits; 500 are too many"),
    ],
)
def test_addition_and_sorting_refuse_count_above_part_size(task: Callable[..., object], message: str):
    with pytest.raises(ConfigError, match=message):
        next(iter(task(count=500, digits=2, part="held_out")))  # type: ignore[call-overload]
