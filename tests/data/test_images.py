"""Images of rows: which files are read, and how they are turned; what is refused, with the row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from opd.data.images import images_in, taken
from opd.errors import DataError
from opd.files import opened_image
from opd.stage.images import with_copies
from opd.types import Prompt

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)  # 12 wide, 8 high
FRAMES = [Pillow.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 100, 200)]


def encoded(picture: Any, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def read(value: Any) -> np.ndarray[Any, Any]:
    (image,) = images_in(value, "Line 3", Path())
    return np.asarray(opened_image(image, "Line 3"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_is_upright_as_transformers_reads_it(orientation: int, tmp_path: Path):
    """Phones save pixels as the sensor has them, and the turn beside them."""
    from transformers.image_utils import load_image

    exif = Pillow.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(Pillow.fromarray(PIXELS), exif=exif))
    for given in (str(file), file.read_bytes(), Pillow.open(file)):
        assert np.array_equal(read(given), np.asarray(load_image(str(file))))
    rows = with_copies(tmp_path / "images", [{"images": images_in(str(file), "", Path())}], most=1)
    assert (rows[0]["images"][0]["width"], rows[0]["images"][0]["height"]) == ((12, 8), (8, 12))[orientation > 4]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
def test_modes_of_eight_bits_are_read_in_rgb(mode: str):
    picture = Pillow.fromarray(PIXELS).convert(mode)
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(read(encoded(picture, "TIFF")), expected)
    assert np.array_equal(read(picture), expected)


DEEP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
PNG = encoded(Pillow.fromarray(PIXELS))
JPEG = encoded(Pillow.fromarray(PIXELS), "JPEG")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (encoded(Pillow.fromarray(DEEP)), "mode I;16 of pillow, more than 8 bits a channel.*Scale it"),
        (encoded(Pillow.fromarray(DEEP.astype(np.float32)), "TIFF"), "mode F of pillow"),
        (Pillow.fromarray(DEEP.astype(np.int32)), "mode I of pillow"),
        (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "has 3 frames, and an image is one"),
        (PNG[: len(PNG) // 2], "not a readable image"),
        (JPEG[: len(JPEG) // 2], "not a readable image"),
        (b"<html>404</html>", "pillow knows no such format"),
        ("a" * 5000, "a text of 5000 characters, 'a{40}'..., and no path is as long.*base64"),
        ("b" * 400, "cannot be read"),
        (".", "cannot be read .Is a directory"),
    ],
    ids=["16 bits", "float", "32 bits", "frames", "half png", "half jpeg", "page", "base64", "long name", "folder"],
)
def test_image_that_cannot_be_read_names_the_row(value: Any, why: str):
    with pytest.raises(DataError, match=f"(?s)^Line 3, image 0.*{why}") as error:
        images_in(value, "Line 3", Path())
    assert " at 0x" not in str(error.value)


def test_photo_with_a_preview_is_one_image():
    """The JPEG of some phones, MPO, has a second frame: a preview or a depth."""
    data = encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:2])
    assert read(data).shape == (4, 4, 3)


@pytest.mark.parametrize("key", ["url", "base64"])
def test_part_with_an_address_names_the_remedy(key: str):
    part = {"type": "image", key: "https://example.org/cat.png"}
    with pytest.raises(DataError, match=r"Line 3, image 0 is the address .*Download it"):
        taken(Prompt(id=0, content=({"role": "user", "content": [part]},)), "Line 3", Path())
