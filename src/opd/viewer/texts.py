"""What student and teacher read, with the difference marked, and conversations: as lists that a page can show."""

from __future__ import annotations

import json
import re
from difflib import SequenceMatcher
from typing import Any, TypeAlias

Parts: TypeAlias = list[list[Any]]  # of ["=", text], ["-", the student's], ["+", the teacher's], ["…", characters]

PIECES = 3000  # of two texts that are compared piece by piece; longer ones by their common start and end
SAME = 1600  # characters of an equal part that are shown
REPEATED = re.compile(r"(<[^<>\s]{1,60}>)\1{3,}")
OWN = 6000  # of a part that only one of them reads


def difference(student: str | None, teacher: str | None) -> Parts:
    """The texts as one list of parts: equal ones, the student's alone and the teacher's alone, the middle of long ones
    left out. A text that is None is absent: the other is all its own.
    """
    if student is None or teacher is None or student == teacher:
        whole = teacher if student is None else student
        kind = "=" if student == teacher else "+" if student is None else "-"
        return [] if whole is None else _shortened([[kind, whole]])
    first, second = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (student, teacher))
    if len(first) + len(second) > PIECES:
        return _shortened(_by_ends(student, teacher))
    parts: Parts = []
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    for what, a, b, c, d in matcher.get_opcodes():
        if what == "equal":
            parts.append(["=", "".join(first[a:b])])
        else:
            parts += [["-", "".join(first[a:b])]] if b > a else []
            parts += [["+", "".join(second[c:d])]] if d > c else []
    return _shortened(parts)


def placeholders_counted(text: str | None) -> str | None:
    """The text with a count in place of many equal placeholders: `<image> × 576` is one image of 576 tokens."""
    if text is None:
        return None
    return REPEATED.sub(lambda found: f"{found[1]} \u00d7 {len(found[0]) // len(found[1])}", text)


def _by_ends(student: str, teacher: str) -> Parts:
    """The parts of long texts: what is equal at the start and at the end, and all between."""
    most = min(len(student), len(teacher))
    start = next((i for i in range(most) if student[i] != teacher[i]), most)
    left = most - start
    end = next((i for i in range(left) if student[-1 - i] != teacher[-1 - i]), left)
    between = [["-", student[start : len(student) - end]], ["+", teacher[start : len(teacher) - end]]]
    parts = [["=", student[:start]], *between, ["=", student[len(student) - end :]]]
    return [part for part in parts if part[1]]


def _shortened(parts: Parts) -> Parts:
    """Without the middle of long parts."""
    out: Parts = []
    for kind, text in parts:
        limit = SAME if kind == "=" else OWN
        if len(text) <= limit:
            out.append([kind, text])
        else:
            out += [[kind, text[: limit // 2]], ["…", len(text) - limit], [kind, text[-(limit // 2) :]]]
    return out


def conversation(messages: str | None) -> list[list[str]] | None:
    """[role, text] of each message of a conversation in JSON; None for a single message of a user, which is the prompt.

    Text that is no conversation is None too: the page then shows the prompt alone.
    """
    try:
        found = json.loads(messages or "null")
    except ValueError:
        return None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return None
    turns = [[str(one.get("role", "")), _said(one.get("content"))] for one in found]
    return None if len(turns) < 2 and [role for role, _ in turns] in ([], ["user"]) else turns


def _said(content: Any) -> str:
    """The text of a message: itself, or that of its parts."""
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    return "" if content is None else str(content)


def shortened(text: str, most: int = 4 * SAME) -> str:
    """A text without the middle, of which it says how long it is."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} … {len(text) - most:,} characters left out … {text[-(most // 2) :]}"


def _part(part: Any) -> str:
    """The text of a part of a message; an image has its place in the text, and stands beside it in the page."""
    if not isinstance(part, dict):
        return str(part)
    return "[image]" if part.get("type") == "image" else str(part.get("text", ""))
