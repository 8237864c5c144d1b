"""Images of prompts in a page: small copies from the run's folder, within a budget, and places in them.

A place of a response is shown only if the data say in which unit it is: the row has a `box` in pixels, and its answer
is a place in this box.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from opd.viewer.pack import Packer
from opd.viewer.read import Columns

NAME = re.compile(r"[0-9a-f]{32}")
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 1 << 20  # bytes of a copy that is shown; the copies of opd are below 110,000
MOST = 16  # images of a row that are shown
REDUCED = 128  # pixels of a copy, with 64 colours, if those of a page are more than it can hold
NUMBER = r"(-?\d{1,7}(?:\.\d{1,4})?)"
PLACE = re.compile(rf"[(\[]\s*{NUMBER}\s*,\s*{NUMBER}\s*[)\]]")

Shown: TypeAlias = list[list[Any]]  # [name, width, height] of each image


@dataclass(slots=True)
class Album:
    """The images that the blocks of a page name, and the folder that has their copies."""

    folders: dict[str, Path] = field(default_factory=dict[str, Path])
    blocks: list[list[str]] = field(default_factory=list[list[str]])  # names by block, in the order of its rows

    def begin(self) -> None:
        """The next images are of another block."""
        self.blocks.append([])

    def add(self, images: Shown, folder: Path | None) -> None:
        """Note the images of a row of a file in `folder`."""
        for name, _, _ in images:
            if folder is not None and name not in self.folders:
                self.folders[name] = folder
                self.blocks[-1].append(name)

    def bytes(self, most: int) -> tuple[bytes, dict[str, Any]] | None:
        """The block of their copies, of at most `most` bytes, and what of them is in it; None without images.

        All blocks have their first images in it before one has all of its own.
        """
        turns = chain.from_iterable(zip_longest(*self.blocks))
        names = [name for name in turns if name is not None]
        if not names:
            return None
        sizes = {name: size for name in names if (size := size_of(self.folders[name], name))}
        whole = sum(sizes.values()) <= most
        shown: dict[str, bytes] = {}
        for name in sizes:
            data = copy_in(self.folders[name], name) or b""
            data = data if whole else reduced(data)
            most -= len(data)
            if most < 0:
                break
            shown[name] = data
        packer = Packer()
        if shown:
            packer.add({}, "png", "small", np.frombuffer(b"".join(shown.values()), np.uint8))
        counts = {"of": len(names), "shown": len(shown), "absent": len(names) - len(sizes), "whole": whole}
        return packer.bytes({"images": [[name, len(data)] for name, data in shown.items()]}), counts


def size_of(stage: Path, name: str) -> int:
    """The bytes of the copy of an image in a stage's folder; 0 without one, and for what is no small PNG."""
    file = stage / "images" / f"{name}.png"
    try:
        size = file.stat().st_size if NAME.fullmatch(name) else 0
        with file.open("rb") as opened:
            return size if size <= LARGEST and opened.read(len(PNG)) == PNG else 0
    except OSError:
        return 0


def copy_in(stage: Path, name: str) -> bytes | None:
    """The copy of an image in a stage's folder as PNG; None if there is none."""
    return (stage / "images" / f"{name}.png").read_bytes() if size_of(stage, name) else None


def reduced(data: bytes) -> bytes:
    """A smaller PNG of the same image, or the same bytes: without pillow, and for what it cannot read."""
    try:
        from PIL import Image as Pillow

        with Pillow.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((REDUCED, REDUCED))
        buffer = io.BytesIO()
        picture.quantize(64, Pillow.Quantize.FASTOCTREE).save(buffer, format="PNG")
    except (ImportError, OSError, ValueError):
        return data
    return min(data, buffer.getvalue(), key=len)


def images_of(columns: Columns, name: str, i: int) -> Shown:
    """The images of a row in the column `name`: at most `MOST`, those with a name of the format."""
    found: Sequence[Mapping[str, Any]] = columns.value(name, i) or []
    return [
        [one["image"], one["width"], one["height"]] for one in found[:MOST] if NAME.fullmatch(str(one.get("image")))
    ]


def place_of(columns: Columns, i: int) -> list[float] | None:
    """The last place (x, y) of a response, in pixels of the first image; None if the data do not say so.

    They do if the row has a box, and its answer is a place in it.
    """
    box, answer = columns.value("box", i), _place(columns.value("answer", i))
    if box is None or answer is None or not _inside(answer, box):
        return None
    return _place(columns.value("response", i))


def _place(text: str | None) -> list[float] | None:
    found = PLACE.findall(text or "")
    return [float(one) for one in found[-1]] if found else None


def _inside(place: Sequence[float], box: Sequence[float]) -> bool:
    return box[0] <= place[0] < box[2] and box[1] <= place[1] < box[3]
