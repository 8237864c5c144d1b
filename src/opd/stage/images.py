"""Small copies of the images that models read, beside a stage's files of responses: what a page shows of a prompt.

A copy has the name of its image (`name_of`), so an image of many rows and steps is kept once, and what a row names is
the image that the model read, not the copy. No number of a run depends on them.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.errors import DataError
from opd.files import opened_image, write_atomically
from opd.types import Image, Prompt

FOLDER = "images"
SIDE = 320  # pixels of a copy at most, on the longer side
LARGEST = 48_000  # bytes of a copy with all its colours; a larger one gets 256 of them
OCTREE = 2  # of pillow's ways to choose colours: 30 times as fast as the default
READ_BY = ("images", "teacher_images")  # the columns: of the student and of the teacher


def name_of(image: Image) -> str:
    """What names an image in rows and files: the first 32 hexadecimal digits of the SHA-256 of its file."""
    return image.digest[:32]


def file_of(image: Image) -> str:
    """The place of its copy in the stage's folder."""
    return f"{FOLDER}/{name_of(image)}.png"


def box_of(prompt: Prompt) -> list[float] | None:
    """The row's `box`: left, top, right and bottom in pixels of its first image. None if it has no such column."""
    box: Any = prompt.metadata.get("box")
    if not prompt.images or not isinstance(box, (list, tuple)) or len(box) != 4:
        return None
    numbers = [float(one) for one in box if isinstance(one, (int, float)) and math.isfinite(one)]
    return numbers if len(numbers) == 4 else None


def with_copies(folder: Path, rows: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """The rows with {"image", "width", "height"} in place of each image, after copies were written to `folder`.

    At most `most` different images of these rows have a copy, those of picked rows first. An image that cannot be read
    any more has no size and no copy: the responses are worth more. Raises RunError if a copy cannot be written.
    """
    order = sorted(rows, key=lambda row: row.get("pick") is None)
    different = {name_of(image): image for row in order for image in _images(row)}
    sizes = {name: _size(image) for name, image in different.items()}
    for name in list(different)[:most]:
        file = folder / f"{name}.png"
        if sizes[name] != (None, None) and not file.exists():
            folder.mkdir(exist_ok=True)
            with contextlib.suppress(DataError):
                write_atomically(file, copy_of(opened_image(different[name], name)))
    return [{**row, **{key: _described(row[key], sizes) for key in READ_BY if row.get(key)}} for row in rows]


def copy_of(picture: Any) -> bytes:
    """A PIL image as PNG: at most `SIDE` pixels wide and high, and of fewer colours if it is large."""
    picture.thumbnail((SIDE, SIDE))
    data = _png(picture)
    return data if len(data) <= LARGEST else _png(picture.quantize(256, OCTREE))


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _images(row: Mapping[str, Any]) -> Iterable[Image]:
    return (image for key in READ_BY for image in row.get(key) or ())


def _described(images: Sequence[Image], sizes: Mapping[str, tuple[Any, Any]]) -> list[dict[str, Any]]:
    names = [name_of(image) for image in images]
    return [{"image": name, "width": sizes[name][0], "height": sizes[name][1]} for name in names]


def _size(image: Image) -> tuple[int | None, int | None]:
    """Width and height in pixels, upright, from the header of its file."""
    try:
        from PIL import ExifTags
        from PIL import Image as Pillow

        with Pillow.open(image.path or io.BytesIO(image.content or b"")) as opened:
            lies = False
            with contextlib.suppress(OSError):  # of a PNG this reads all of the file, which may be damaged
                lies = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # turned by a quarter
            return (opened.height, opened.width) if lies else (opened.width, opened.height)
    except (ImportError, OSError):
        return None, None
