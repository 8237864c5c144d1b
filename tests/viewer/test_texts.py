"""What two models read, and text that a terminal or a page may show."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.messages import visible
from opd.viewer.texts import conversation, difference, placeholders_counted


@given(st.text("ab <>\n", max_size=60), st.text("ab <>\n", max_size=60))
def test_difference_holds_both_texts(student, teacher):
    parts = difference(student, teacher)
    assert "".join(text for kind, text in parts if kind in "=-") == student
    assert "".join(text for kind, text in parts if kind in "=+") == teacher


def test_difference_marks_what_the_teacher_alone_reads():
    parts = difference("<|user|>What?<|end|>", "<|system|>Be brief.<|end|><|user|>What?<|end|>")
    assert "".join(text for kind, text in parts if kind == "+") == "<|system|>Be brief.<|end|>"
    assert not [text for kind, text in parts if kind == "-"]


def test_difference_of_long_texts_is_what_is_between_equal_ends():
    same = "word " * 4000
    parts = difference(same + "first" + same, same + "second hand" + same)
    assert [part for part in parts if part[0] in "+-"] == [["-", "first"], ["+", "second hand"]]
    assert ["…", 4000 * 5 - 1600] in parts
    assert sum(len(text) for kind, text in parts if kind == "=") == 2 * 1600


@pytest.mark.parametrize(("student", "teacher", "parts"), [(None, None, []), ("a", None, [["-", "a"]])])
def test_difference_of_absent_text(student, teacher, parts):
    assert difference(student, teacher) == parts


def test_conversation_has_roles_and_texts():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]},
        {"role": "assistant", "content": None},
    ]
    assert conversation(json.dumps(messages)) == [["system", "Be brief."], ["user", "Hi[image]"], ["assistant", ""]]


@pytest.mark.parametrize("text", [None, "no JSON", "3", '["a"]', "[]", '[{"role": "user", "content": "Hi"}]'])
def test_conversation_is_none_without_several_messages(text):
    assert conversation(text) is None


def test_visible_writes_control_characters_out():
    assert visible("a\x1b[31m\u202eb\u200b\n\t") == "a\u2039U+001B\u203a[31m\u2039U+202E\u203ab\u2039U+200B\u203a\n\t"


def test_placeholders_are_counted():
    assert placeholders_counted("<s>a" + "<image>" * 576 + "b<pad><pad>") == "<s>a<image> \u00d7 576b<pad><pad>"
    assert placeholders_counted(None) is None
