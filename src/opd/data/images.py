"""The images of a row: from paths, bytes or PIL images, and the places of its text that they belong to."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.data.files import ending_of
from opd.errors import DataError
from opd.files import encoded_image, expanded, in_rgb, opened_image
from opd.messages import IMAGE, as_parts
from opd.plugins import packaged
from opd.types import Image, Message, Prompt

IN_PART = ("image", "path", "url", "base64")  # keys of a part that hold its image, of which addresses are refused
LONGEST = 4096  # characters of a path
FIRST = f"have images without a place in the text, so these come first (a part of type 'image', or {IMAGE}, is a place)"


def images_in(value: Any, where: str, folder: Path) -> tuple[Image, ...]:
    """The images of a column: one, or a list. Raises DataError, beginning with `where`, for what is no image.

    An image is a path (relative to `folder`), the bytes of a file, {"bytes", "path"} as `datasets` writes them, a PIL
    image, or an `Image`.
    """
    if value is None:
        return ()
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(_image(one, f"{where}, image {i}", folder) for i, one in enumerate(given))


def image_column(row: Mapping[str, Any]) -> str | None:
    """The column that holds the row's images: `images`, or `image` if it holds one and not a name of something else."""
    if row.get("images") is not None:
        return "images"
    value = row.get("image")
    is_name = isinstance(value, str) and not (mimetypes.guess_type(value)[0] or "").startswith("image/")
    return None if value is None or value == [] or is_name else "image"


def folder_of(path: str) -> Path:
    """The folder to which paths in the data of a section's `path` are relative; that of the program for a function."""
    if path.startswith("package:"):
        return packaged(path).parent
    place = expanded(path)
    if place.is_dir():
        return place
    return place.parent if ending_of(place) else Path()


def placed(prompt: Prompt, where: str) -> tuple[Prompt, list[str]]:
    """The prompt with a place for each of its images, and what was done. Raises DataError if places and images differ.

    A place is a part of type `image`, or the text `<image>`. Without any, the images come first, in the first message
    of the user, as TRL puts them.
    """
    count, content = len(prompt.images), prompt.content
    if isinstance(content, str):
        places = content.count(IMAGE) if count else 0
        said = [FIRST] if count and not places else []
        content = IMAGE * count + content if said else content
    else:
        content = tuple(as_parts(message) for message in content) if count else content
        places = sum(_places(message) for message in content)
        said = [FIRST] if count and not places else []
        content = _first(content, count, where) if said else content
    if not said and places != count:
        raise DataError(
            f"{where} has {count} images, and its prompt {places} places for them. Give each image one place: a part "
            f"{{'type': 'image'}} of a message, or {IMAGE} in the text."
        )
    return replace(prompt, content=content), said


def taken(prompt: Prompt, where: str, folder: Path) -> Prompt:
    """The prompt with the images that parts of its messages hold themselves, as TRL writes them.

    Raises DataError if only some parts hold one, or the row has a column of images beside them.
    """
    if isinstance(prompt.content, str):
        return prompt
    own: list[Any] = []
    places = 0
    messages: list[Message] = []
    for message in prompt.content:
        said = message.get("content")
        if isinstance(said, str) or said is None:
            messages.append(message)
            continue
        shown: list[Any] = []
        for part in said:
            if part.get("type") == "image":
                places += 1
                own += [part[key] for key in IN_PART if part.get(key) is not None][:1]
                part = {"type": "image"}
            shown.append(part)
        messages.append({**message, "content": shown})
    if not own:
        return prompt
    if prompt.images or len(own) != places:
        raise DataError(
            f"{where} has {places} parts of type 'image', of which {len(own)} hold an image, and a column of "
            f"{len(prompt.images)} images. Give all images in one of the two ways."
        )
    return replace(prompt, content=tuple(messages), images=images_in(own, where, folder))


def _image(value: Any, where: str, folder: Path) -> Image:
    if isinstance(value, Image):
        return value
    if isinstance(value, Mapping) and {"bytes", "path"} & {*value}:
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    picture: Any = value
    if hasattr(picture, "save") and hasattr(picture, "convert"):  # of PIL
        return encoded_image(in_rgb(picture, f"{where}: a PIL image"), "a PIL image")
    if isinstance(value, (bytes, bytearray)):
        return _readable(Image(name="bytes", digest=hashlib.sha256(value).hexdigest(), content=bytes(value)), where)
    if not isinstance(value, (str, Path)):
        raise DataError(
            f"{where} is a {type(value).__name__}, got {value!r:.60}. Give a path, the bytes of a file, or a PIL image."
        )
    if str(value).startswith(("http://", "https://", "data:")):
        raise DataError(
            f"{where} is the address {str(value)[:60]!r}, and opd reads files. Download it, and give its path."
        )
    if len(str(value)) > LONGEST:
        raise DataError(
            f"{where} is a text of {len(str(value))} characters, {str(value)[:40]!r}..., and no path is as long. Give "
            "a path, or bytes in Parquet; base64 is not read."
        )
    path = folder / expanded(value)
    try:
        content = path.read_bytes()
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(
            f"{where}: {path} {why}. Paths of images are relative to the data's file: correct it."
        ) from error
    return _readable(Image(name=str(value), digest=hashlib.sha256(content).hexdigest(), path=path), where)


def _readable(image: Image, where: str) -> Image:
    """The image, decoded once: a row with a damaged file is named before anything runs. Raises DataError."""
    opened_image(image, where)
    return image


def _places(message: Message) -> int:
    said = message.get("content")
    return 0 if isinstance(said, str) or said is None else sum(part.get("type") == "image" for part in said)


def _first(messages: tuple[Message, ...], count: int, where: str) -> tuple[Message, ...]:
    at = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        raise DataError(f"{where} has {count} images and no message of the user. Give each image a part of a message.")
    said = messages[at]["content"]
    parts = [{"type": "text", "text": said}] if isinstance(said, str) else list(said or ())
    shown = {**messages[at], "content": [*({"type": "image"} for _ in range(count)), *parts]}
    return (*messages[:at], shown, *messages[at + 1 :])
