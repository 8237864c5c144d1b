"""The reward math_verify: its table on the page, its parts, and its limit of time."""

from __future__ import annotations

import re
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from opd.errors import ConfigError, DataError
from opd.rewards.base import TimedOut
from opd.rewards.calls import interrupted
from opd.rewards.mathematics import OutOfTime, bare, final_answer, is_words, last_box, math_verify, number_of
from opd.types import Prompt

pytest.importorskip("math_verify")

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
ROWS = re.findall(r"^\| `(.+)` \| `(.+)` \| ([01]) \|$", PAGE.read_text(), re.MULTILINE)


def value_of(answer: object, response: str, **options: float) -> float:
    return math_verify(**options).function(Prompt(id=0, content="?", answer=answer), response)


def test_page_has_forty_rows_of_both_kinds():
    assert len(ROWS) >= 40
    assert sum(reward == "0" for *_, reward in ROWS) >= 10


@pytest.mark.parametrize(("answer", "response", "reward"), ROWS)
def test_math_verify_pays_as_the_page_says(answer, response, reward):
    assert value_of(answer, response) == float(reward)


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("5", "\\[\n x = 5 \n\\]", 1),
        ("72", "Natalia sold 48/2 = 24 in May.\n#### 72", 1),
        ("4", "**Answer:** 4", 1),
        ("4", "The answer to 2+2 is 4.", 1),
        ("Monday", "It is on Monday.", 0),
        ("$x^2 + 1$", "we get \\boxed{1 + x^2}", 1),
        (18, "The answer is 18", 1),
        ("18", "\\boxed{18 \\text{ cm}^2}", 1),
        ("(100,200)", "\\boxed{(100,200)}", 1),
        ("12000", "It is 12\\,000 in all", 1),
        ("3+4i", "4i+3", 1),
        ("e", "2.718282", 1),
        ("H2O", "\\boxed{H2O}", 1),
        ("6", "He bought $5 and $6, so the answer is $6.", 1),
        ("-5", "\\boxed{\u20135}", 1),
        ("1234567", "1'234'567", 1),
    ],
)
def test_math_verify_reads_forms_of_answers(answer, response, reward):
    assert value_of(answer, response) == reward


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("14", "<Answer>14</Answer>", 1),
        ("14", "<answer>14", 1),  # the closing tag was the stop string
        ("14", "<answer>12</answer> <answer>14</answer>", 1),
        ("12", "<answer>12</answer> <answer>14</answer>", 0),
        ("14", "<answer>13</answer> 14", 0),
        ("14", "14 <answer></answer>", 0),
        ("Paris", "<answer>Paris</answer>", 1),
        ("5", "<think>\\boxed{5}</think>\nThe answer is 6.", 0),
        ("5", "<think>\\boxed{5}</think>", 1),
    ],
)
def test_math_verify_reads_the_part_that_answers(answer, response, reward):
    assert value_of(answer, response) == reward


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("12 \\text{ inches}", "\\boxed{12 \\text{ feet}}"),
        ("12 \\text{ cm}^2", "\\boxed{12 \\text{ cm}}"),
        ("$5", "\\boxed{5\\%}"),
        ("12 \\text{ million}", "\\boxed{12}"),
        ("1010_2", "\\boxed{1010_{3}}"),
        ("y'", "\\boxed{y}"),
        ("2", "\\boxed{\\neq 2}"),
        ("> 2", "\\boxed{< 2}"),
        ("2024", "\\boxed{20 24}"),
        ("5", "The answer is 5 and 6"),
    ],
)
def test_math_verify_refuses_what_the_package_drops(answer, response):
    assert value_of(answer, response) == 0
    assert value_of(answer, f"\\boxed{{{answer}}}") == 1


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("{1}", None),
    ],
)
def test_last_box_is_the_last_that_is_closed(text, content):
    assert last_box(text) == content


@pytest.mark.parametrize(
    ("text", "value", "percent"),
    [
        ("12 000", 12000, False),
        ("12{,}000.5", Fraction(24001, 2), False),
        ("-$5", -5, False),
        ("$-5", -5, False),
        ("-1 1/2", Fraction(-3, 2), False),
        ("1e3", 1000, False),
        (".5", Fraction(1, 2), False),
        ("50\\%", 50, True),
    ],
)
def test_number_of_reads_plain_numbers(text, value, percent):
    number = number_of(text)
    assert number is not None
    assert (number.value, number.percent) == (value, percent)


@pytest.mark.parametrize("text", ["", "1, 2", "x", "1/0", "10-5", "12 00", "--5", "1.2.3", "0 000"])
def test_number_of_refuses_other_texts(text):
    assert number_of(text) is None


def test_words_are_letters_that_are_no_constant():
    assert all(map(is_words, ("Paris", "B", "(B)", "New York", "xy", "é")))
    assert not any(map(is_words, ("pi", "e", "x y", "2x", "x*y", "", "18 apples")))


def test_bare_removes_markup_until_nothing_changes():
    assert bare(" **$\\text{Paris}$**. ") == "Paris"
    assert bare("\\(x\\)") == "x"
    assert bare("2**3") == "2**3"
    assert bare("'yes'") == "yes"
    assert bare("$y'$") == "y'"
    assert final_answer("x\n\nIt is 5\n").text == "It is 5"


HARD = "\\boxed{9^{9^{9^9}}}"


def test_math_verify_stops_at_its_limit_and_marks_the_reward():
    started = time.process_time()
    value = value_of("3/4 + x", HARD, timeout_s=0.2)
    assert isinstance(value, TimedOut)
    assert value == 0.0
    assert time.process_time() - started < 5
    assert not isinstance(value_of("3/4 + x", "no idea", timeout_s=0.2), TimedOut)


def test_cpu_limit_ignores_time_without_work():
    """The verdict of a waiting process is that of a quiet machine."""
    with interrupted(0.05, OutOfTime, cpu=True):
        time.sleep(0.2)


def test_math_verify_works_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(value_of("2 + 2", "\\boxed{4}")))
    thread.start()
    thread.join()
    assert results == [1.0]


@pytest.mark.parametrize("seconds", [-1, "5", True, float("nan"), float("inf")])
def test_math_verify_refuses_a_wrong_limit(seconds):
    with pytest.raises(ConfigError, match=r"got `timeout_s: .*`\. Give seconds, 0 for no limit"):
        math_verify(timeout_s=seconds)


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_math_verify_refuses_an_empty_answer(answer):
    reward = math_verify()
    row = Prompt(id=7, content="?", answer=answer)
    with pytest.raises(DataError, match="Prompt 7: its `answer` is empty"):
        reward.function(row, "5")
    assert reward.unreadable is not None
    assert reward.unreadable(row) == "its `answer` is empty"
