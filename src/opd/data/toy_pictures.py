"""Toy tasks with pictures of 32 x 32 pixels and checkable answers: data functions for recipes, and their reward."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np

from opd.data.toy import Numbers, Part, different
from opd.errors import ConfigError
from opd.types import Prompt

SIDE = 32  # pixels of a picture
SHAPE = 7  # pixels of a square
DOT = 5  # of a dot
CELL = 8  # of the cells in which a trace states its place
BACKGROUND = (64, 64, 64)  # the image processor's `image_mean` times 255: an empty patch is then 0
GREEN = (0, 128, 0)  # of the box alone, as in `pieces.boxes`
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255, 255, 255)}
DIRECTIONS = {"L": (-1, 0), "R": (1, 0), "U": (0, -1), "D": (0, 1)}
FRAMES = 4
CLICK = re.compile(r"\((\d\d),(\d\d)\)")

Pixels: TypeAlias = np.ndarray[Any, Any]  # [SIDE, SIDE, 3] uint8


def clicks(
    count: int, shapes: int = 2, seed: int = 0, part: Part = "train", boxed: float = 0.0
) -> Iterator[dict[str, Any]]:
    """`count` different pictures of coloured squares, with the name of one of them.

    {"prompt": "red<image>", "images": [PNG], "response": "(07,21)", "box": [3, 17, 12, 26], ...}: the response is the
    place of the square's middle from the left and the top, `box` its pixels (left, top, right, bottom, the last two
    outside). `privileged_images` has the same picture with a green box around the square. A share `boxed` of the rows
    has it as `images`, too, so that a model learns to read it. The part of a picture depends on its squares alone.
    Raises ConfigError for a number of squares that does not fit.
    """
    if not 1 <= shapes <= 3:
        raise ConfigError(f"`shapes` is {shapes}, and a picture holds 1 to 3 squares.")
    names = list(COLOURS)

    def draw(rng: np.random.Generator) -> Numbers:
        while True:  # drawn again as a whole, because a square in the middle may leave no room for others
            places = [int(n) for n in rng.integers(2, SIDE - SHAPE - 1, 2 * shapes)]
            corners = list(zip(places[::2], places[1::2], strict=True))
            if all(_apart(one, other) for one, other in combinations(corners, 2)):
                return (*places, *(int(n) for n in rng.permutation(len(names))[:shapes]))

    total = (SIDE - SHAPE - 3) ** (2 * shapes) * math.perm(len(names), shapes)
    marked = np.random.default_rng((seed, count))
    for numbers in different(count, draw, seed=seed, part=part, total=total, what=f"pictures of {shapes} squares"):
        places, colours = numbers[: 2 * shapes], numbers[2 * shapes :]
        plain = _empty()
        for i, colour in enumerate(colours):
            x, y = places[2 * i : 2 * i + 2]
            plain[y : y + SHAPE, x : x + SHAPE] = COLOURS[names[colour]]
        x, y = places[:2]  # the first is asked for
        box = [x, y, x + SHAPE, y + SHAPE]
        with_box = _boxed(plain, box)
        shown = with_box if marked.random() < boxed else plain
        place = f"({x + SHAPE // 2:02d},{y + SHAPE // 2:02d})"
        yield {
            "prompt": f"{names[colours[0]]}<image>",
            "images": [_png(shown)],
            "privileged_images": [_png(with_box)],
            "response": place,
            "answer": place,
            "box": box,
        }


def clicked(prompt: Prompt, text: str) -> float:
    """1 for a place inside the row's box, else 0: the reward of `clicks`."""
    found = CLICK.fullmatch(text.strip())
    if found is None:
        return 0.0
    left, top, right, bottom = prompt.metadata["box"]
    return float(left <= int(found[1]) < right and top <= int(found[2]) < bottom)


Order: TypeAlias = Literal["forward", "reversed", "shuffled", "still"]


def moving_dot(
    count: int,
    seed: int = 0,
    part: Part = "train",
    order: Order = "forward",
    traced: bool = False,
    knowing: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """`count` different clips of four frames in which a dot moves left, right, up or down, 4 to 6 pixels a frame.

    {"prompt": "<image><image><image><image>", "images": [four PNGs], "response": "L", "answer": "L"}. `traced`: the
    response first has the dot's cell in each frame, column and row of 4 x 4 cells, "30>20>20>10:L". A share `knowing`
    of the prompts, drawn by row, begins with the response and `;`, so that a model trained on them learns to read it.

    `order` is for controls whose answer is still that of the clip: frames `reversed`, `shuffled` (drawn by row, never
    as they were), or `still`, the first frame four times, which does not tell. Parts as in `opd.data.toy.addition`.
    """
    names = list(DIRECTIONS)

    def draw(rng: np.random.Generator) -> Numbers:
        speed = int(rng.integers(4, 7))
        ends = [4, _starts(speed), SIDE - DOT, len(COLOURS)]
        return speed, *(int(n) for n in rng.integers(0, ends))

    total = 4 * (SIDE - DOT) * len(COLOURS) * sum(map(_starts, (4, 5, 6)))
    drawn = np.random.default_rng((seed, count))
    for numbers in different(count, draw, seed=seed, part=part, total=total, what="clips"):
        direction = names[numbers[1]]
        corners = _path(direction, *numbers)
        frames = [_png(_dotted(corner, list(COLOURS.values())[numbers[4]])) for corner in corners]
        cells = ">".join(f"{(x + DOT // 2) // CELL}{(y + DOT // 2) // CELL}" for x, y in corners)
        response = f"{cells}:{direction}" if traced else direction
        shown = f"{response};" if drawn.random() < knowing else ""
        yield {
            "prompt": shown + "<image>" * FRAMES,
            "images": [frames[i] for i in _ordered(order, drawn)],
            "response": response,
            "privileged_context": response,
            "answer": direction,
        }


def _starts(speed: int) -> int:
    """The number of places where a dot of this speed may begin."""
    return SIDE - DOT - speed * (FRAMES - 1) - 1


def _path(direction: str, speed: int, _: int, along: int, across: int, colour: int) -> list[tuple[int, int]]:
    """The dot's left and top pixel in each frame."""
    dx, dy = DIRECTIONS[direction]
    start = along if dx + dy > 0 else along + speed * (FRAMES - 1)
    moved = [start + (dx + dy) * speed * frame for frame in range(FRAMES)]
    return [(one, across) if dx else (across, one) for one in moved]


def _dotted(corner: tuple[int, int], colour: tuple[int, int, int]) -> Pixels:
    x, y = corner
    pixels = _empty()
    pixels[y : y + DOT, x : x + DOT] = colour
    return pixels


def _ordered(order: Order, rng: np.random.Generator) -> list[int]:
    """The clip's frame in each place."""
    if order == "shuffled":
        given = list(range(FRAMES))
        while True:
            if (found := [int(i) for i in rng.permutation(FRAMES)]) != given:
                return found
    return {"forward": [0, 1, 2, 3], "reversed": [3, 2, 1, 0], "still": [0] * FRAMES}[order]


def _apart(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two squares are apart by two pixels, so that the box of one does not cover the other."""
    return max(abs(one[0] - other[0]), abs(one[1] - other[1])) >= SHAPE + 2


def _empty() -> Pixels:
    return np.full((SIDE, SIDE, 3), BACKGROUND, np.uint8)


def _boxed(pixels: Pixels, box: list[int]) -> Pixels:
    """A green line of two pixels around the box."""
    left, top, right, bottom = box
    drawn = pixels.copy()
    drawn[top - 2 : bottom + 2, left - 2 : right + 2] = GREEN
    drawn[top:bottom, left:right] = pixels[top:bottom, left:right]
    return drawn


def _png(pixels: Pixels) -> bytes:
    from PIL import Image as Pillow

    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
