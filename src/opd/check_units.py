"""What can be known to be wrong, before any weight is loaded, where student and teacher have a tokenizer each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.errors import ConfigError
from opd.method import Method
from opd.needs import needs_of
from opd.types import TeacherRule


def check_units(method: Method, where: str) -> None:
    """Refuse what asks for one vocabulary of a pair with two, and units of a pair with one. Raises ConfigError."""
    two = method.teacher.tokenizer == "any"
    if two != (method.support.kind == "units"):
        raise ConfigError(
            f"{where} has a teacher whose tokenizer is {method.teacher.tokenizer!r} and the support "
            f"{method.support.kind!r}. Units are for a teacher with a tokenizer of its own, and it for units: give "
            "both teacher=external(tokenizer='any') and support=units(), or neither."
        )
    if two and method.top_k:
        raise ConfigError(
            f"{where} compares the most likely tokens of student and teacher, and the teacher has a tokenizer of its "
            "own. Leave out the piece that does, or use a method whose teacher has the student's tokenizer."
        )
    if "teacher" in needs_of(method.update):
        check_comparison(method, where, "validation by teacher_kl", "Validate by the reward")


def check_comparison(method: Method, where: str, setting: str, remedy: str) -> None:
    """Refuse a `setting` that compares both distributions at each token. Raises ConfigError."""
    if method.teacher.tokenizer == "any":
        raise ConfigError(
            f"{where}: {setting} compares student and teacher token by token, and in this method the teacher has a "
            f"tokenizer of its own. {remedy}; the metric units/signal is the divergence on units."
        )


def check_tokens(
    rule: TeacherRule,
    student: Any,
    teacher: Any,
    names: tuple[str, str],
    *,
    chat: bool,
    options: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> str | None:
    """What two tokenizers share, in words; None for all. Raises AlignmentError where the rule needs more.

    `chat` and both templates' `options` are those of `alignment.pair_of`.
    """
    from opd.alignment import pair_of
    from opd.teachers.local import check_same_tokens

    if rule.tokenizer == "students":
        check_same_tokens(student, teacher, names)
        return None
    pair = pair_of(student, teacher, chat=chat, options=options)
    ends = [f"{student.decode([end])!r} is read as {teacher.decode([its])!r}" for end, its in pair.ends.items()]
    return (
        f"{names[0]} ({len(student.get_vocab())} tokens) and {names[1]} ({len(teacher.get_vocab())}) share "
        f"{len(pair.shared)} tokens; the end of a response: {', '.join(ends) or 'is not compared'}"
    )
