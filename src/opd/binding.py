"""Pieces that ask for the student's tokenizer: declared as such, and handed it when a stage is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opd.errors import ConfigError
from opd.needs import Piece


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
