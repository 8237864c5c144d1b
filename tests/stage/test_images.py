"""Small copies of images beside a stage's files of responses."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from opd.data.images import images_in
from opd.files import encoded_image
from opd.stage.folder import StageDir
from opd.stage.images import LARGEST, SIDE, box_of, name_of, with_copies
from opd.types import Image, Prompt


def picture(width: int, height: int, seed: int = 0) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return encoded_image(Pillow.fromarray(pixels), f"noise {seed}")


def row(*images: Image, pick: str | None = None) -> dict[str, Any]:
    return {"images": images, "teacher_images": None, "pick": pick}


def test_small_image_is_kept_pixel_by_pixel(tmp_path: Path):
    image = picture(32, 20)
    (found,) = with_copies(tmp_path / "images", [row(image)], most=9)
    name = hashlib.sha256(image.content or b"").hexdigest()[:32]
    assert found["images"] == [{"image": name, "width": 32, "height": 20}]
    copy, own = (
        np.asarray(Pillow.open(one)) for one in (tmp_path / f"images/{name}.png", io.BytesIO(image.content or b""))
    )
    assert np.array_equal(copy, own)


def test_large_image_is_reduced_and_has_its_own_size_in_the_row(tmp_path: Path):
    image = picture(1000, 600)
    (found,) = with_copies(tmp_path / "images", [row(image)], most=9)
    file = tmp_path / "images" / f"{name_of(image)}.png"
    assert found["images"] == [{"image": name_of(image), "width": 1000, "height": 600}]
    assert Pillow.open(file).size == (SIDE, 192)
    assert Pillow.open(file).mode == "P"
    assert file.stat().st_size < 2 * LARGEST  # noise, which nothing compresses


def test_copies_are_written_once_and_of_picked_rows_first(tmp_path: Path):
    folder, images = tmp_path / "images", [picture(8, 8, seed) for seed in range(4)]
    rows = [row(images[0]), row(images[1], images[1]), row(images[2], images[1], pick="most"), row(images[3])]
    shown = with_copies(folder, rows, most=3)
    assert sorted(file.stem for file in folder.iterdir()) == sorted(name_of(one) for one in (*images[1:3], images[0]))
    assert [len(one["images"]) for one in shown] == [1, 2, 2, 1]
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    with_copies(folder, rows, most=3)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written


def test_rows_without_images_make_no_folder(tmp_path: Path):
    rows = [{"prompt": "x", "images": None}, {"prompt": "y"}, row(picture(4, 4))]
    assert with_copies(tmp_path / "images", rows[:2], most=9) == rows[:2]
    with_copies(tmp_path / "images", rows, most=0)
    assert not (tmp_path / "images").exists()


def test_image_that_is_gone_or_damaged_loses_no_response(tmp_path: Path):
    files = [tmp_path / f"{n}.png" for n in range(2)]
    for n, file in enumerate(files):
        file.write_bytes(picture(64, 64, n).content or b"")
    gone, cut = images_in([str(file) for file in files], "row", tmp_path)
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:200])  # its header can be read
    (found,) = with_copies(tmp_path / "images", [row(gone, cut)], most=9)
    assert [one["width"] for one in found["images"]] == [None, 64]
    assert not list((tmp_path / "images").iterdir())


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, "4"], "1234", None, [1, 2, 3, float("nan")]])
def test_box_is_four_numbers(box: Any):
    image = (picture(4, 4),)
    assert box_of(Prompt(id=0, content="x", images=image, metadata={"box": box})) is None
    assert box_of(Prompt(id=0, content="x", images=image, metadata={"box": [1, 2, 3.5, 4]})) == [1.0, 2.0, 3.5, 4.0]
    assert box_of(Prompt(id=0, content="x", metadata={"box": [1, 2, 3, 4]})) is None


def test_stage_folder_writes_images_of_its_files(tmp_path: Path):
    (tmp_path / "samples").mkdir()
    stage, image = StageDir(tmp_path, most_images=5), picture(8, 8)
    file = stage.write_samples(1, [{"prompt": "x", "images": (image,), "box": [1.0, 2.0, 3.0, 4.0]}])
    (found,) = pq.read_table(file).to_pylist()
    assert found["images"] == [{"image": name_of(image), "width": 8, "height": 8}]
    assert found["teacher_images"] is None
    assert (tmp_path / "images" / f"{name_of(image)}.png").exists()
