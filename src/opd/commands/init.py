"""`opd init`: six questions, and a recipe that `opd check` accepts. The method follows docs/choosing.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opd.errors import AlignmentError, ConfigError, RunError
from opd.files import expanded, write_atomically
from opd.recipe.load import parse_recipe, parse_section
from opd.recipe.packaged import write_schema
from opd.recipe.schema import DataSection, ModelSpec
from opd.recipe.yaml_text import write_text

NOTHING, PRIVILEGED, RESPONSES, RULE = "nothing", "privileged", "responses", "rule="
QUESTIONS = {
    "student": "Student: a model folder, hub id or GGUF file",
    "teacher": "Teacher: the same, servers as http://HOST:PORT,..., or none",
    "data": "Data: a file with `prompt` in each row, reasoning_gym:TASK, ...",
    "also": "What there is besides prompts: nothing, a reward (exact, math_verify, my_package.mine:function), "
    "privileged (a column privileged_context), rule=TEXT (read by the teacher alone), or responses",
    "budget": "Budget: steps of training (20 to try)",
    "name": "Name of the run",
}
DEFAULTS = {"teacher": "none", "also": NOTHING, "budget": "200"}
HELD_OUT = 64  # at most, and a tenth of the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers to the six questions, as texts."""

    student: str
    teacher: str
    data: str
    also: str
    budget: str
    name: str

    @property
    def reward(self) -> str | None:
        """The name of a reward, if that is what there is."""
        other = self.also in (NOTHING, PRIVILEGED, RESPONSES) or self.also.startswith(RULE)
        return None if other else self.also

    @property
    def urls(self) -> list[str]:
        """The addresses of a served teacher."""
        return [one for one in self.teacher.split(",") if one] if re.match(r"https?://", self.teacher) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A method with its options, the reason, and what of an evaluation it allows."""

    method: str
    why: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    n: int = 1  # responses per prompt
    trains_on_reward: bool = False
    teacher: bool = True  # the teacher is read
    compared: bool = True  # an evaluation may compare with the teacher


def answers(given: dict[str, str | None], prompt: Callable[[str, str | None], str] | None) -> Answers:
    """The answers given by flags, and the others from `prompt(question, default)`, or the defaults without a terminal.

    Raises ConfigError for one that has no default.
    """
    found: dict[str, str] = {}
    for key, question in QUESTIONS.items():
        default = DEFAULTS.get(key)
        if key == "name":
            default = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(found["student"]).stem).strip("-.") or None
        value = given.get(key)
        if value is None and prompt is not None:
            value = prompt(question, default)
        if value is None:
            value = default
        if not value:
            raise ConfigError(f"opd init runs without a terminal, and --{key} is not given ({question}). Give it.")
        found[key] = value.strip()
    return Answers(**found)


def choose(given: Answers, same_tokens: bool) -> Choice:
    """The method for what there is, by docs/choosing.md. `same_tokens`: teacher and student have one tokenizer.

    Raises ConfigError if there is nothing to learn from.
    """
    if given.also == RESPONSES:
        return Choice(
            method="sft",
            why="The data has responses, and this imitates them; a teacher's scores on the student's own responses are "
            "a next stage.",
            teacher=False,
        )
    return _alone(given) if given.teacher == "none" else _taught(given, same_tokens)


def _alone(given: Answers) -> Choice:
    """Without a teacher."""
    if given.also == NOTHING:
        raise ConfigError(
            "opd init got neither a teacher nor a reward, privileged text or responses (--also), so there is nothing "
            "to learn from. Name a teacher, or what there is."
        )
    if given.reward is not None:
        return Choice(
            method="grpo",
            why="A verifier and no teacher: the reward alone, its learning rate tuned first (docs/studies/anti_sd.md).",
            n=8,
            trains_on_reward=True,
        )
    rule = given.also.startswith(RULE)
    return Choice(
        method="context_distillation",
        why="The teacher is the student itself, which reads more. A rule that all prompts share carries over, facts of "
        "single prompts do not (docs/studies/privileged.md).",
        options={"k": None, **({"system": given.also.removeprefix(RULE)} if rule else {"information": "solution"})},
    )


def _taught(given: Answers, same_tokens: bool) -> Choice:
    """With a teacher."""
    if not same_tokens:
        left = "" if given.also == NOTHING else f" It does not read what is called {given.also.partition('=')[0]} here."
        return Choice(
            method="simct",
            why="The teacher has another tokenizer: the loss is on the pieces of text that are whole in both "
            f"(docs/studies/simct.md).{left if given.reward is None else ' The reward is measured only.'}",
            compared=False,
        )
    if given.reward is not None:
        return Choice(
            method="mopd",
            why="A verifier and a teacher: the reward beside the log-ratio ended above plain distillation "
            "(docs/studies/order_margin.md). Tune its weight, options.reward.",
            options={"reward": 1.0},
            n=4,
            trains_on_reward=True,
            compared=not given.urls,
        )
    top = {"k": 20, "by": "teacher", "form": "tail"}
    if given.also != NOTHING:
        rule = given.also.startswith(RULE)
        return Choice(
            method="context_distillation",
            why="The teacher reads more than the student. A rule that all prompts share carries over, facts of single "
            "prompts do not (docs/studies/privileged.md).",
            options={
                "teacher": "external",
                **(top if given.urls else {"k": None}),
                **({"system": given.also.removeprefix(RULE)} if rule else {"information": "solution"}),
            },
            compared=not given.urls,
        )
    if given.urls:
        return Choice(
            method="topk_reverse_kl",
            why="A teacher on servers gives its most likely tokens, and the form `tail` keeps the rest as one "
            "(docs/studies/losses.md).",
            options=top,
            compared=False,
        )
    return Choice(
        method="reverse_kl",
        why="The teacher has the student's tokenizer and is in this process: exact, and no estimator to choose "
        "(docs/choosing.md).",
    )


def written(given: Answers, out: str | None) -> list[Path]:
    """Write the recipe, and the schema beside it; returns the files.

    Raises the errors of `opd check` for a recipe that it refuses, and RunError for a file that exists; then nothing is
    written.
    """
    file = expanded(out or f"{given.name}.yaml")
    if file.exists():
        raise RunError(f"{file} exists. Give another --out or --name: nothing was written.")
    if not given.budget.isdecimal() or int(given.budget) < 1:
        raise ConfigError(f"The budget is a number of steps, at least 1; got {given.budget!r}.")
    from opd.commands.check import checked_recipe

    tree, choice = recipe_of(given)
    checked_recipe(parse_recipe(tree, source="the recipe of opd init"))
    write_atomically(file, text_of(tree, choice))
    return [file, *write_schema(file.parent)]


def recipe_of(given: Answers) -> tuple[dict[str, Any], Choice]:
    """The recipe as a tree, and the choice of its method. Loads the tokenizers and the rows, no weights."""
    from opd.data.prompts import load_prompts
    from opd.models.preview import tokenizer_of

    student = tokenizer_of(ModelSpec(path=given.student), "student")
    choice = choose(given, _same_tokens(given, student))
    k = choice.options.get("k")
    if k is not None and student is not None and k > (size := len(student.get_vocab())):  # a small vocabulary
        choice = replace(choice, options={**choice.options, "k": size})
    if student is None:  # of a GGUF file that only its conversion reads
        why = f"{choice.why} The student's tokenizer is read with its weights: until then data.chat is assumed."
        choice = replace(choice, why=why)
    chat = student is None or bool(student.chat_template)
    data = {"path": given.data, "chat": chat}
    rows = len(load_prompts(parse_section(DataSection, data, "data")))
    held_out = min(HELD_OUT, rows // 10)
    models: dict[str, Any] = {"student": {"path": given.student}}
    stage: dict[str, Any] = {"name": "distil", "train": "student"}
    if given.teacher != "none" and choice.teacher:
        models["teacher"] = {"server": {"urls": given.urls}} if given.urls else {"path": given.teacher}
        stage["teacher"] = "teacher"
    stage |= {"method": choice.method} | ({"options": choice.options} if choice.options else {})
    if choice.trains_on_reward:
        stage["reward"] = {"name": given.reward}
    stage["data"] = {**data, "skip": held_out} if held_out > 1 else data
    stage["sampling"] = {"max_completion_length": 256, "n": choice.n}
    stage["steps"] = int(given.budget)
    if held_out > 1:
        stage["evaluate"] = _evaluation(given, choice, {**data, "limit": held_out})
    tree = {"name": given.name, "seed": 0, "models": models, "stages": [stage]}
    return tree, choice


def _same_tokens(given: Answers, student: Any) -> bool:
    """Whether the teacher has the student's tokens; of servers it has to: see docs/served.md.

    Also true where a tokenizer is read with the weights, of a GGUF file that only its conversion reads: then a run
    refuses another one when it loads them.
    """
    from opd.models.preview import tokenizer_of
    from opd.models.vocabularies import check_same_tokens

    if given.teacher == "none" or given.urls:
        return True
    teacher = tokenizer_of(ModelSpec(path=given.teacher), "teacher")
    if student is None or teacher is None:
        return True
    try:
        check_same_tokens(student, teacher)
    except AlignmentError:
        return False
    return True


def _evaluation(given: Answers, choice: Choice, data: dict[str, Any]) -> dict[str, Any]:
    """The section of held-out prompts: sampled and greedy, and the distance from a teacher that can be compared."""
    setting = {"max_completion_length": 256}
    section: dict[str, Any] = {"data": data}
    if given.reward is not None and not choice.trains_on_reward:
        section["reward"] = {"name": given.reward}
    section["sampling"] = {"greedy": {"temperature": 0, **setting}, "sampled": setting}
    distils = choice.method not in ("grpo", "sft")
    return section | ({"kl": True, "teacher": True} if distils and choice.compared else {})


def text_of(tree: dict[str, Any], choice: Choice) -> str:
    """The recipe as YAML, with the reason of its method as a comment above it."""
    text = write_text(tree)
    why = "".join(f"  # {line}\n" for line in _lines(choice.why))
    body = re.sub(r"^(  method: )", lambda found: why + found[1], text, count=1, flags=re.MULTILINE)
    head = [
        "# yaml-language-server: $schema=recipe.schema.json",
        "# Written by opd init. Before a run: opd check, and opd doctor (will this teacher teach this student?).",
        "# Full weights are trained; models.student.lora: {rank: 16} trains an adapter.",
    ]
    return "\n".join(head) + "\n" + body


def _lines(text: str, width: int = 110) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
