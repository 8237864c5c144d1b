"""A context that marks the answer in the teacher's picture, a green box with the rest faded (arXiv 2605.00642)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from opd.errors import ConfigError, DataError
from opd.files import encoded_image, opened_image
from opd.messages import with_question
from opd.pieces.contexts import same_prompt
from opd.pieces.needs import needing
from opd.plugins import np
from opd.types import Context, Image, Prompt, Rollout

Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two outside
Hint: TypeAlias = Literal["none", "box", "hint", "gt"]

WORDS = {
    "hint": " Hint: The answer is located within the green rectangle.",  # of the released code
    "gt": " Hint: The answer is located within the green rectangle. It is {answer}.",  # the last sentence is ours
}
COLOUR = "green"  # of PIL: (0, 128, 0)


def boxed(hint: Hint = "hint", *, column: str = "box", width: int = 5, fade: bool = True) -> Context:
    """The teacher sees the prompt's first image with a box around the pixels of the row's `column`.

    `width`: of the line, in pixels, drawn outside of the box. `fade`: pixels get darker with their distance from the
    box (`faded`). `hint`: `none` is the student's prompt as it is, without a box; `box` the box alone; `hint` also says
    that the answer is in it; `gt` also says the row's `answer`.

    Raises ConfigError for a width below 1; DataError for a prompt without an image, and for a box that is no box in it.
    """
    if hint == "none":
        return same_prompt()
    if width < 1:
        raise ConfigError(f"The line of a box is at least 1 pixel wide, got {width}.")

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        return [_marked(rollout.prompt, hint, column, width, fade) for rollout in rollouts]

    return needing(context, columns={column, "images"} | ({"answer"} if hint == "gt" else set()))


def _marked(prompt: Prompt, hint: Hint, column: str, width: int, fade: bool) -> Prompt:
    where = f"Prompt {prompt.id}"
    if not prompt.images:
        raise DataError(f"{where} has no image to mark. Give the column `images`, or set `hint: none`.")
    box = _box(prompt.metadata.get(column), f"{where}: `{column}`")
    images = (drawn(prompt.images[0], box, width, fade, where), *prompt.images[1:])
    words = WORDS.get(hint, "").format(answer=prompt.answer)
    said: Callable[[str], str] = lambda text: text + words  # noqa: E731
    content = with_question(prompt.content, said, where) if words else prompt.content
    return replace(prompt, images=images, content=content)


def _box(value: Any, where: str) -> Box:
    numbers = [float(one) for one in value] if _is_box(value) else []
    if len(numbers) != 4 or not all(math.isfinite(one) for one in numbers):
        raise DataError(f"{where} is {value!r:.60}. Give four numbers, in pixels: left, top, right, bottom.")
    left, top, right, bottom = (int(one) for one in numbers)
    if left >= right or top >= bottom:
        raise DataError(f"{where} is {value!r:.60}, a box without pixels. Give left < right and top < bottom.")
    return left, top, right, bottom


def _is_box(value: Any) -> bool:
    given: list[Any] = list(value) if isinstance(value, (list, tuple)) else []  # type: ignore[arg-type]
    return bool(given) and all(isinstance(one, (int, float)) for one in given)


@lru_cache(maxsize=1024)  # the responses of a group have one picture
def drawn(image: Image, box: Box, width: int, fade: bool, where: str) -> Image:
    """The image with the box. Raises DataError for a box that is not inside of it."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    picture = opened_image(image, where)
    columns, rows = picture.size
    left, top, right, bottom = box
    if left < 0 or top < 0 or right > columns or bottom > rows:
        raise DataError(
            f"{where}: the box {list(box)} is not inside the image {image.name} of {columns} x {rows} pixels. Boxes "
            "are in pixels of the image's file, not in shares or thousandths: convert them."
        )
    if fade:
        pixels: Any = np.asarray(picture, np.float64) * faded(columns, rows, box)[:, :, None]
        picture = Pillow.fromarray(pixels.round().astype(np.uint8))
    line = (left - width, top - width, right + width - 1, bottom + width - 1)
    ImageDraw.Draw(picture).rectangle(line, outline=COLOUR, width=width)
    return encoded_image(picture, f"{image.name} with a box")


def faded(columns: int, rows: int, box: Box) -> Any:
    """exp(-d^2 / 2 s^2) by pixel, [rows, columns]: d is the distance to the box, 0 inside.

    s = max(1.5 max(w, h), sqrt(.1) min(columns, rows)), with the box's width w and height h.
    """
    left, top, right, bottom = box
    spread = max(1.5 * max(right - left, bottom - top), math.sqrt(0.1) * min(columns, rows))
    x, y = np.arange(columns), np.arange(rows)
    across = np.maximum(0, np.maximum(left - x, x - (right - 1)))
    down = np.maximum(0, np.maximum(top - y, y - (bottom - 1)))
    return np.exp(-(across[None, :] ** 2 + down[:, None] ** 2) / (2 * spread**2))
