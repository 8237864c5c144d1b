"""What a piece of a method declares that it reads: columns, rewards, and numbers that cost something to make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from opd.errors import ConfigError

Piece = TypeVar("Piece", bound=Callable[..., Any])


def needing(piece: Piece, *needs: str, **numbers: int) -> Piece:
    """Declare on a piece what it reads: columns and rewards that the recipe has to give (`Method.needs` collects,
    `opd check` compares), and numbers of a Batch that cost something to make ("teacher_logp", "teacher_entropy",
    "student_entropy"). No needs declare that it reads none of them. A weight or a keep that looks at the token that was
    drawn declares "sampled_token": a baseline (`opd.pieces.baselines`) is biased beside it. What draws the student
    towards its teacher "imitates", what drives it away "ascends": `opd check` refuses both at once. A weight by how far
    the teacher is to be trusted declares "trusts": it may not weigh a reward. A source in which the teacher scores what
    is being written declares "unfinished".

    `numbers` say how much of something: `top_k`, how many of each model's most likely tokens at every position;
    `response_tokens`, how long a response has to be allowed to get; `first_look`, after how many tokens the first look
    at an unfinished response comes; `student_writes`, whether a source that is "off_policy" also draws from the
    student."""
    piece.needs = frozenset(needs)  # type: ignore[attr-defined]
    piece.numbers = numbers  # type: ignore[attr-defined]
    return piece


def needs_of(*pieces: Callable[..., Any]) -> frozenset[str]:
    """Everything that the pieces declared."""
    return frozenset[str]().union(*(getattr(piece, "needs", frozenset[str]()) for piece in pieces))


def numbers_of(*pieces: Callable[..., Any]) -> dict[str, int]:
    """The largest of each number that the pieces declared."""
    found: dict[str, int] = {}
    for piece in pieces:
        for name, number in getattr(piece, "numbers", {}).items():
            found[name] = max(number, found.get(name, 0))
    return found


def reads(piece: Callable[..., Any], name: str) -> bool:
    """Whether a piece of phase A needs the sampled tokens' `teacher_logp` or an entropy to be made for it.

    An entropy has to be declared. A piece that declares nothing is taken to read `teacher_logp`.
    """
    declared = getattr(piece, "needs", None)
    return name == "teacher_logp" if declared is None else name in declared


def turned(needs: frozenset[str]) -> frozenset[str]:
    """What a piece times a negative number declares: it pulls the other way."""
    sides = {"imitates": "ascends", "ascends": "imitates"}
    return frozenset(sides.get(need, need) for need in needs)


def binding(piece: Piece, bind: Callable[[Any], Piece]) -> Piece:
    """Declare that a piece asks for the student's tokenizer: `bind(tokenizer)` is the piece that can be called."""
    piece.bind = bind  # type: ignore[attr-defined]
    return piece


def bound(piece: Piece, tokenizer: Any) -> Piece:
    """The piece with the tokenizer handed to it, if it asks for one; else itself. Raises what its `bind` raises."""
    bind = getattr(piece, "bind", None)
    return piece if bind is None else bind(tokenizer)


def unbound(name: str) -> Callable[..., Any]:
    """What stands for a piece that has not got its tokenizer yet. Raises ConfigError when it is called."""

    def piece(*_: Any) -> Any:
        raise ConfigError(
            f"{name} asks for the student's tokenizer and was called without one. Give it one first: "
            "method.bound(tokenizer); a stage does that by itself."
        )

    return piece
