"""One row to a prompt: the assistant's last turn, tools, other data sets' forms, and what is counted on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd.data.prompts import load_selected, prompts_of_rows, read_rows, require_columns
from opd.errors import ConfigError, DataError
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection
from opd.types import Prompt

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {}}}}}


def read(rows: Any, **fields: Any) -> tuple[list[Prompt], list[str]]:
    """The prompts, and the notes."""
    prompts, reports = read_rows(rows, **fields)
    return prompts, [str(report) for report in reports]


def loaded(path: Path, rows: list[dict[str, Any]], **fields: Any) -> tuple[list[Prompt], list[str]]:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, reports = load_selected(parse_section(DataSection, {"path": str(path), **fields}, "data"))
    return prompts, [str(report) for report in reports]


# --- the assistant's last turn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_last_assistant_turn_becomes_response(tmp_path, ending):
    turns = [USER, {"role": "assistant", "content": "4?"}, {"role": "user", "content": "sure?"}, ANSWER]
    rows = [{"messages": [USER, ANSWER]}, {"messages": turns}, {"messages": [USER]}]
    prompts, notes = loaded(tmp_path / f"rows{ending}", rows, columns={"prompt": "messages"})
    assert [p.content for p in prompts] == [(USER,), tuple(turns[:3]), (USER,)]
    assert [p.response for p in prompts] == ["4", "4", None]
    assert [p.prefill for p in prompts] == ["", "", ""]
    (note,) = notes
    assert note.startswith(
        f"{tmp_path}/rows{ending}: 2 of 3 rows end with the assistant's turn, which is their `response`"
    )


def test_last_assistant_turn_is_continued_or_dropped():
    rows = [{"prompt": [USER, {"role": "assistant", "content": "It is "}], "response": "4."}]
    ([begun], [note]) = read(rows, last_assistant="continue")
    assert (begun.content, begun.prefill, begun.response) == ((USER,), "It is ", "4.")
    assert "1 of 1 rows end with the assistant's turn, which is the beginning of the answer" in note
    ([bare], [note]) = read(rows, last_assistant="drop")
    assert (bare.content, bare.prefill, bare.response) == ((USER,), "", "4.")
    assert "which is left out" in note


def test_last_assistant_turn_of_prompt_objects_becomes_response():
    given = [Prompt(id=7, content=(USER, ANSWER)), Prompt(id=9, content="2+2=")]
    prompts, notes = read(given)
    assert prompts == [Prompt(id=7, content=(USER,), response="4"), given[1]]
    assert len(notes) == 1


def test_prompt_objects_refuse_images():
    with pytest.raises(DataError, match="Prompt 3, message 0 has a part of type 'image_url'"):
        read([Prompt(id=3, content=({"role": "user", "content": [{"type": "image_url"}]},))])


def test_last_assistant_refuses_second_response():
    with pytest.raises(
        DataError, match=r"Row 0 .*turn '4', and the row has the response '5'\. Set `last_assistant: con"
    ):
        read([{"prompt": [USER, ANSWER], "completion": "5"}])
    ([same], _) = read([{"prompt": [USER, ANSWER], "completion": "4"}])
    assert same.response == "4"
    with pytest.raises(ConfigError, match=r"last_assistant.*'response', 'continue' or 'drop' \(got 'keep'\)"):
        read([{"prompt": [USER]}], last_assistant="keep")


# --- all of the assistant's turns ------------------------------------------------------------------------------------

CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
SAYS = {"role": "tool", "content": "4"}
NOTHING = {"role": "assistant", "content": " "}
SHOWS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_all_assistant_turns_become_response(tmp_path, ending):
    rows = [{"messages": [USER, CALLS, SAYS, ANSWER]}, {"messages": [USER, ANSWER]}]
    prompts, notes = loaded(tmp_path / f"rows{ending}", rows, columns={"prompt": "messages"}, assistant_turns="all")
    assert [p.content for p in prompts] == [(USER,), (USER,)]
    assert [p.response for p in prompts] == ["4", "4"]
    assert [[turn["role"] for turn in p.turns] for p in prompts] == [["assistant", "tool", "assistant"], []]
    assert prompts[0].turns[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert any("2 of 2 rows are conversations of which all turns" in note for note in notes)


def test_completion_of_several_messages_and_texts_in_turn():
    ([chat, text], _) = read(
        [
            {"prompt": [USER], "completion": [CALLS, SAYS, ANSWER]},
            {"prompt": "?", "response": ["b;", "<", "a;"]},
        ],
        assistant_turns="all",
    )
    assert [turn["role"] for turn in chat.turns] == ["assistant", "tool", "assistant"]
    assert (chat.response, text.response) == ("4", "a;")
    assert [(turn["role"], turn["content"]) for turn in text.turns] == [
        ("assistant", "b;"),
        ("user", "<"),
        ("assistant", "a;"),
    ]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"prompt": [USER, NOTHING, USER, ANSWER]}, {}, r"turn 0 of the response \(assistant\) says nothing"),
        ({"prompt": [USER, ANSWER, USER, NOTHING]}, {}, r"turn 2 of the response \(assistant\) says nothing"),
        ({"prompt": "?", "completion": [CALLS, SAYS, ANSWER]}, {}, "calls a tool .* and the prompt is a text"),
        (
            {"prompt": [USER], "completion": [ANSWER, SHOWS, ANSWER]},
            {},
            r"turn 1 of the response \(user\) holds an image",
        ),
        ({"prompt": [ANSWER, USER, ANSWER]}, {}, "begins with the assistant, so there is no prompt"),
        ({"prompt": [USER, ANSWER], "response": "5"}, {}, "has the response '5' too"),
        ({"prompt": "?", "response": ["a"]}, {"chat": True}, "is a list of texts, and the prompt is a conversation"),
        ({"prompt": "?", "response": ["a", "<", ""]}, {}, r"turn 2 of the response \(assistant\) says nothing"),
        ({"prompt": [USER], "completion": [SAYS, ANSWER]}, {}, "roles tool, assistant"),
    ],
)
def test_turns_without_place_are_refused(row: dict[str, Any], fields: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        read([row], assistant_turns="all", **fields)


@pytest.mark.parametrize("after", [[USER], [SAYS, USER]])
def test_what_follows_the_last_turn_is_left_out_and_counted(after: list[Any]):
    ([prompt], notes) = read([{"prompt": [USER, ANSWER, USER, ANSWER, *after]}], assistant_turns="all")
    assert [turn["role"] for turn in prompt.turns] == ["assistant", "user", "assistant"]
    assert "prompts: 1 of 1 rows lose what follows the assistant's last turn" in notes
    ([text], _) = read([{"prompt": "?", "response": ["a", "<"]}], assistant_turns="all")
    assert (text.response, text.turns) == ("a", ())


def test_conversation_may_end_with_a_call():
    """Its response is a call without a text, which counts as a response."""
    ([prompt], _) = read([{"prompt": [USER, CALLS, SAYS]}], assistant_turns="all")
    assert (prompt.response, prompt.turns) == ("", (CALLS,))
    require_columns([prompt], ["response"], source="prompts")


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_each_turn_becomes_a_prompt_with_what_stands_before(tmp_path, ending):
    more = {"role": "user", "content": "Sure?"}
    rows = [{"messages": [USER, CALLS, SAYS, ANSWER, more]}, {"messages": [USER]}, {"messages": [USER, ANSWER]}]
    prompts, notes = loaded(tmp_path / f"rows{ending}", rows, columns={"prompt": "messages"}, assistant_turns="each")
    assert [p.id for p in prompts] == [0, 1, 2, 3]
    assert [[m["role"] for m in p.content] for p in prompts] == [
        ["user"],
        ["user", "assistant", "tool"],
        *[["user"]] * 2,
    ]
    assert [p.response for p in prompts] == ["", "4", None, "4"]
    assert [[turn["role"] for turn in p.turns] for p in prompts] == [["assistant"], [], [], []]  # a call is no text
    assert prompts[0].turns[0] == prompts[1].content[1]
    assert [(p.metadata.get("row"), p.metadata.get("turn")) for p in prompts[:2]] == [(0, 0), (0, 1)]
    assert "turn" not in prompts[3].metadata
    assert any("all turns of the assistant are responses (`assistant_turns: each`)" in note for note in notes)
    assert any("1 of 3 rows lose what follows the assistant's last turn" in note for note in notes)


def test_each_turn_of_prompts_and_completions():
    row = {"prompt": [USER], "completion": [ANSWER, USER, ANSWER], "answer": 4, "row": "a"}
    ((first, second), _) = read([row], assistant_turns="each")
    assert (first.content, second.content) == ((USER,), (USER, ANSWER, USER))
    assert (first.response, second.response, second.answer) == ("4", "4", 4)
    assert second.metadata == {"row": "a", "turn": 1}, "a column of the data keeps its name"
    given = [Prompt(id=7, content=(USER, ANSWER, USER, ANSWER)), Prompt(id=7, content=(USER,))]
    assert [(p.id, len(p.content)) for p in prompts_of_rows(given, assistant_turns="each")] == [(0, 1), (1, 3), (2, 1)]


def test_rows_are_selected_and_counted_before_their_turns(tmp_path):
    """A call's turn and its answer's have one question; `select`, `upsample` and messages are about rows."""
    again = {"role": "user", "content": "Sure?"}
    rows = [
        {"messages": [USER, CALLS, SAYS, ANSWER], "pass_rate": 0.5},
        {"messages": [again, ANSWER, USER, ANSWER], "pass_rate": 1.0},
        {"messages": [USER, CALLS, SAYS, ANSWER], "pass_rate": 0.5},
    ]
    fields = {"columns": {"prompt": "messages"}, "assistant_turns": "each"}
    kept, notes = loaded(tmp_path / "rows.jsonl", rows, **fields, select={"distinct": True})
    assert [(p.metadata["row"], p.metadata["turn"]) for p in kept] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert any("2 of 3 rows" in note for note in notes), notes
    more, notes = loaded(tmp_path / "rows.jsonl", rows, **fields, upsample={"times": 2}, skip=1)
    assert [(p.id, p.metadata["row"], p.metadata["turn"]) for p in more] == [
        *((0, 1, 0), (1, 1, 1), (2, 2, 0), (3, 2, 1)),
        *((4, 2, 0), (5, 2, 1)),
    ]
    assert any("1 of 2 rows occur 2 times" in note for note in notes), notes
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": [USER]}]))
    section = parse_section(DataSection, {"path": str(path), **fields}, "data")
    with pytest.raises(DataError, match=r"1 of 4 rows of .* have none \(rows 3\)"):
        load_selected(section, require=["response"])


def test_each_turn_of_a_text_is_refused():
    with pytest.raises(DataError, match="has 3 turns, and the prompt is a text, in which no token ends a turn"):
        read([{"prompt": "?", "response": ["b", "<", "a"]}], assistant_turns="each")
    with pytest.raises(ConfigError, match=r"`assistant_turns: each`.*`last_assistant: drop` takes the last one away"):
        read([{"prompt": [USER, ANSWER]}], assistant_turns="each", last_assistant="drop")


def test_parts_of_turns_behind_a_text_become_one_text():
    parts = {"role": "tool", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "!"}]}
    ([prompt], _) = read([{"prompt": "?", "completion": [ANSWER, parts, ANSWER]}], assistant_turns="all")
    assert prompt.turns[1]["content"] == "4\n!"


def test_turns_of_a_callers_prompt_are_checked():
    turns = ({"from": "gpt", "value": "4"}, USER, ANSWER, USER)
    (prompt,) = prompts_of_rows([Prompt(id=3, content=(USER,), turns=turns)])
    assert [(turn["role"], turn["content"]) for turn in prompt.turns][0::2] == [("assistant", "4"), ("assistant", "4")]
    assert (prompt.response, prompts_of_rows([prompt])) == ("4", [prompt])
    with pytest.raises(DataError, match=r"Prompt 3: the turns of the response have the roles user, assistant"):
        prompts_of_rows([Prompt(id=3, content=(USER,), turns=(USER, ANSWER))])
    with pytest.raises(DataError, match="has the beginning of an answer too, 'So '"):
        prompts_of_rows([Prompt(id=3, content=(USER,), turns=(ANSWER, USER, ANSWER), prefill="So ")])


def test_list_of_turns_names_the_key_that_reads_it():
    with pytest.raises(DataError, match=r"`response` is a list, .*several turns, set `assistant_turns: all` or `each`"):
        read([{"prompt": "?", "response": ["a", "<", "b"]}])


def test_all_turns_and_last_turn_contradict():
    with pytest.raises(ConfigError, match=r"`assistant_turns: all`.*`last_assistant: drop` takes the last one away"):
        read([{"prompt": [USER, ANSWER]}], assistant_turns="all", last_assistant="drop")


@pytest.mark.parametrize("choice", ["response", "continue"])
def test_last_assistant_leaves_out_tool_call_and_empty_turn(choice):
    call = {"role": "assistant", "content": "I add", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    rows = [{"prompt": [USER, call]}, {"prompt": [USER, {"role": "assistant", "content": ""}]}]
    prompts, notes = read(rows, last_assistant=choice)
    assert [(p.content, p.response, p.prefill) for p in prompts] == [((USER,), None, "")] * 2
    assert [note.partition("which ")[2] for note in notes] == [
        "calls a tool, so it is left out",
        "is empty, so it is left out",
    ]


def test_last_assistant_notes_lost_reasoning():
    thought = {**ANSWER, "reasoning_content": "two and two"}
    ([prompt], notes) = read([{"prompt": [USER, thought]}])
    assert prompt.response == "4"
    assert "prompts: 1 of 1 rows lose `reasoning_content` of that turn" in notes
    (_, notes) = read([{"prompt": [USER], "completion": [thought]}])
    assert notes == ["prompts: 1 of 1 rows lose `reasoning_content` of the completion's message"]


# --- for the chat template -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["objects", "text", "texts"])
def test_tools_and_template_variables_reach_prompt(tools):
    row = {"prompt": [USER], "tools": tools, "chat_template_kwargs": {"enable_thinking": False}, "level": 1}
    ([prompt], notes) = read([row])
    assert (prompt.tools, prompt.chat_template_kwargs) == ((TOOL,), {"enable_thinking": False})
    assert (prompt.metadata, notes) == ({"level": 1}, [])


def test_tools_of_text_prompt_stay_in_metadata_with_note():
    ([prompt], [note]) = read([{"prompt": "2+2=", "tools": ["hammer"]}])
    assert (prompt.tools, prompt.metadata) == ((), {"tools": ["hammer"]})
    assert "1 of 1 rows have `tools`, which only a chat template shows" in note
    ([prompt], notes) = read([{"prompt": "2+2=", "tools": [TOOL]}], chat=True)
    assert (prompt.tools, notes) == ((TOOL,), [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": ["hammer"]}, "Row 0 of prompts: `tools` is not valid JSON"),
        ({"tools": [{"x": 1}]}, r"Row 0 of prompts: `tools` holds \{'x': 1\}. Tools are a list of JSON schemas"),
        ({"chat_template_kwargs": "[1]"}, "`chat_template_kwargs` is a list"),
    ],
)
def test_row_refuses_bad_tools(row, message):
    with pytest.raises(DataError, match=message):
        read([{"prompt": [USER], **row}])


def test_row_keeps_empty_images_and_names_of_images():
    prompts = prompts_of_rows(
        [{"prompt": "a", "images": []}, {"prompt": "a", "image": "python:3.12"}, {"prompt": "b", "image": None}]
    )
    assert prompts[1].metadata == {"image": "python:3.12"}


def call(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def test_nulls_of_arrow_leave_tool_calls_and_tools(tmp_path):
    tools = [{"name": "f", "parameters": {"x": {"type": "int"}}}, {"name": "g", "parameters": {"y": {"type": "str"}}}]
    rows = [{"prompt": [USER, call(x=1), call(y="a"), USER], "tools": tools}]
    ([direct], none) = loaded(tmp_path / "rows.jsonl", rows)
    assert not none
    by_arrow = [loaded(tmp_path / "rows.parquet", rows), read(datasets.Dataset.from_list(rows))]
    for [prompt], [note] in by_arrow:
        assert prompt == direct
        assert "1 of 1 rows lose nulls in tool calls or tools" in note


def test_null_of_jsonl_stays_in_tool_call(tmp_path):
    ([prompt], _) = loaded(tmp_path / "rows.jsonl", [{"prompt": [USER, call(x=None), USER]}])
    assert prompt.content[1] == call(x=None)


# --- other data sets' forms ------------------------------------------------------------------------------------------


def test_sharegpt_messages_become_roles():
    said = [("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    rows = [{"conversations": [{"from": name, "value": text} for name, text in said]}]
    ([prompt], notes) = read(rows, columns={"prompt": "conversations"})
    assert [(m["role"], m["content"]) for m in prompt.content] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    assert prompt.response == "d"
    assert "1 of 1 rows have ShareGPT's messages" in notes[0]


def test_alpaca_input_follows_instruction():
    rows = [{"instruction": "Add.", "input": "2 2", "output": "4"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    prompts, notes = read(rows, columns={"prompt": "instruction", "response": "output"})
    assert [(p.content, p.response) for p in prompts] == [("Add.\n\n2 2", "4"), ("Hi", "Ho")]
    assert notes == ["prompts: 1 of 2 rows have an `input`, which follows the `instruction` after an empty line"]
    ([own], _) = read(rows[:1], columns={"prompt": "instruction", "answer": "input"})
    assert (own.content, own.answer) == ("Add.", "2 2")


@pytest.mark.parametrize("column", ["instruction", "question"])
def test_context_column_is_noted(column: str):
    """Dolly and SQuAD have the text that a question is about in a column of its own."""
    rows = [{column: "Who?", "context": "Ada wrote it."}, {column: "Why?", "context": ""}]
    prompts, notes = read(rows, columns={"prompt": column})
    assert [prompt.content for prompt in prompts] == ["Who?", "Why?"]
    assert len(notes) == 1
    assert notes[0].startswith("prompts: 1 of 2 rows have a column `context` that is not in the prompt")
    assert read(rows, columns={"prompt": column, "privileged_context": "context"})[1] == []


def test_system_column_is_read_when_mapped_and_else_noted():
    rows = [{"system_prompt": "Be brief.", "prompt": "hi"}, {"system_prompt": "", "prompt": "ho"}]
    prompts, notes = read(rows)
    assert [p.content for p in prompts] == ["hi", "ho"]
    assert notes == [
        "prompts: 1 of 2 rows have a column `system_prompt` that is not in the prompt: "
        "`columns: {system: system_prompt}` puts it there"
    ]
    prompts, notes = read(rows, columns={"system": "system_prompt"})
    assert [[m["role"] for m in p.content] for p in prompts] == [["system", "user"], ["user"]]
    assert not notes
