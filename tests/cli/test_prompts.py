"""What a run reads of everyday data, and what `opd check` says of it; a date in the prompt stays that of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import command, one_stage, prepare, tiny_model, write_rows

import opd
from opd.errors import DataError
from opd.models.templates import dated
from opd.recipe.load import parse_recipe
from opd.runs import stages
from opd.runs.checks import check_stages
from opd.runs.prepare import Given

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | trim }}{% else %};{{ m.content }};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}={% endif %}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}+1"}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(4)
]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    write_rows(Path("chats.jsonl"), CHATS)
    return tmp_path / "work"


def recipe(template: str = TEMPLATE, **stage: Any) -> dict[str, Any]:
    data = {"path": "chats.jsonl", "columns": {"prompt": "messages"}, **stage.pop("data", {})}
    made = one_stage(data=data, **stage)
    made["models"] = {
        "teacher": tiny_model(1, chat_template=template),
        "student": tiny_model(2, chat_template=template),
    }
    return made


def checked(made: dict[str, Any]) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    ended = command("check", "recipe.yaml")
    assert ended.code == 0, ended.err
    return ended.out


def test_check_counts_answers_that_leave_prompts():
    out = checked(recipe(evaluate={"data": {"path": "chats.jsonl", "columns": {"prompt": "messages"}, "limit": 3}}))
    assert (
        "chats.jsonl: 4 of 4 rows end with the assistant's turn, which is their `response` and not in the prompt" in out
    )
    assert "chats.jsonl: 3 of 3 rows end with the assistant's turn" in out
    assert "longest prompt: 4 tokens" in out


def test_run_reads_prompt_without_answer_and_learns_answer():
    run = opd.run(recipe(method="sft", teacher=None, samples_every=1), quiet=True)
    assert {(row["prompt"], row["response"]) for row in run.samples} <= {(f"{n}+1", f"{n + 1}") for n in range(4)}


def test_continue_gives_beginning_of_answer_to_student_and_teacher(monkeypatch):
    read: list[str] = []
    real = opd.models.render.render

    def spy(prompt: Any, tokenizer: Any, options: Any = None) -> list[int]:
        ids = real(prompt, tokenizer, options or {})
        read.append(tokenizer.decode(ids))
        return ids

    for module in ("opd.models.render", "opd.teachers.local"):
        monkeypatch.setattr(f"{module}.render", spy)
    opd.run(recipe(data={"last_assistant": "continue"}), quiet=True)
    assert set(read) == {f"{n}+1={n + 1}" for n in range(4)}


def test_check_says_what_templates_lack():
    silent = "{% for m in messages %}{{ m.content }}{% endfor %}{{ day or strftime_now(form or '%d') }}"
    out = checked(recipe(silent))
    for name in ("student", "teacher"):
        assert f"{name}: its chat template has no generation prompt" in out
        assert f"{name}: its chat template calls strftime_now with a format that is not text" in out
    out = checked(recipe("{{ strftime_now(format='%d') }}" + TEMPLATE))
    for name in ("student", "teacher"):
        assert f"{name}: its chat template writes the date; a run keeps the time of its first start" in out
    assert "its chat template" not in checked(recipe())
    made = recipe("{{ day or strftime_now('%d') }}" + TEMPLATE)
    for model in made["models"].values():
        model["template_options"] = {"day": "7"}
    assert "its chat template" not in checked(made)


@pytest.mark.parametrize("turns", ["last", "all", "each"])
def test_check_names_what_the_template_does_not_write(turns: str):
    """The prompt's own turns, and those that are trained."""
    said = {"role": "assistant", "content": "2", "reasoning_content": "1"}
    user = {"role": "user", "content": "1+1"}
    write_rows(Path("chats.jsonl"), [{"prompt": [user, said, user, said]}])
    made = recipe()
    made["stages"][0]["data"] = {"path": "chats.jsonl", "assistant_turns": turns}
    count = 2 if turns == "each" else 1
    line = f"student: {count} conversations have messages with `reasoning_content`, which its chat template does not"
    assert line in checked(made)
    for model in made["models"].values():
        model["chat_template"] = TEMPLATE + "{# reasoning_content #}"
    assert "does not write" not in checked(made)


def test_check_counts_parts_and_beginnings_of_text():
    parts = [
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1"}]}]},
        {"prompt": CHATS[0]["messages"]},
    ]
    write_rows(Path("chats.jsonl"), parts)
    made = recipe()
    made["stages"][0]["data"] = {"path": "chats.jsonl"}
    out = checked(made)
    assert "student: 1 conversations have messages in parts, which are joined to text" in out
    assert "longest prompt: 4 tokens" in out


def test_check_refuses_tools_that_teacher_does_not_show():
    write_rows(Path("chats.jsonl"), [{**row, "tools": [{"name": "1"}]} for row in CHATS])
    made = recipe()
    assert "longest prompt: 5 tokens" in checked(made)
    made["models"]["teacher"]["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    Path("recipe.yaml").write_text(yaml.safe_dump(made))
    ended = command("check", "recipe.yaml")
    assert ended.code == 2
    assert "does not mention the option 'tools'" in ended.err


def test_check_reads_template_from_file():
    Path("chat.jinja").write_text(TEMPLATE)
    assert "longest prompt: 4 tokens" in checked(recipe("chat.jinja"))
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe("chta.jinja")))
    ended = command("check", "recipe.yaml")
    assert ended.code == 2
    assert "there is no file chta.jinja. Did you mean 'chat.jinja'?" in ended.err


def test_resumed_run_keeps_date_of_its_start(monkeypatch):
    """The prompts of a run that began in 2001 hold that year when it goes on; those of a new run this year."""
    years: list[str] = []
    real = stages.train

    def train(stage: Any) -> Any:
        years.append(dated("{{ strftime_now('%Y') }}"))
        return real(stage)

    monkeypatch.setattr("opd.runs.stages.train", train)
    made = recipe("{{ strftime_now('%Y') }}" + TEMPLATE)
    opd.run(made, quiet=True)
    file = Path("run/environment.json")
    environment = json.loads(file.read_text())
    assert years.pop() == f'{{{{ "{environment["started"][:4]}" }}}}'
    file.write_text(json.dumps(environment | {"started": "2001-02-03T04:05:06"}))
    Path("run/distil/done.json").unlink()
    opd.run(made, quiet=True)
    assert years == ['{{ "2001" }}']
    assert json.loads(file.read_text())["started"] == "2001-02-03T04:05:06"


def test_given_prompts_bring_their_reports():
    prompts, reports = opd.data.prompts.read_rows(CHATS, columns={"prompt": "messages"})
    given = Given(prompts=prompts, reports=tuple(reports))
    (prepared,) = check_stages(parse_recipe(recipe()), given).prepared.values()
    (note,) = prepared.tasks[None].notes
    assert note.startswith("prompts: 4 of 4 rows end with the assistant's turn")


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_check_refuses_prompts_that_render_the_same(name: str):
    """A template of the system message alone, which all conversations of the data share."""
    rows = [{"messages": [{"role": "system", "content": "7"}, *row["messages"]]} for row in CHATS]
    write_rows(Path("chats.jsonl"), rows)
    made = recipe()
    assert "longest prompt" in checked(made)
    made["models"][name]["chat_template"] = "{{ messages[0].content }}"
    with pytest.raises(DataError, match=f"{name}: 4 different prompts all render to the same 1 tokens"):
        check_stages(parse_recipe(made), Given())
