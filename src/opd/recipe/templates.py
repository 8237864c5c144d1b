"""The text of a chat template: jinja, or a file of it."""

from __future__ import annotations

from opd.errors import nearest
from opd.files import expanded
from opd.plugins import packaged

ENDINGS = (".jinja", ".jinja2", ".j2", ".txt", ".tmpl")


_NOT_JINJA = "it has no jinja ({{ ... }} or {% ... %}) and is not a file: give a template, or its file"


def template_text(value: str) -> str:
    """The template that `chat_template` gives: the value itself if it is jinja, else the text of the file it names.

    Raises ValueError for a missing file, and for a text without jinja, with which every prompt would be the same.
    """
    if _is_jinja(value):
        return value
    if "\n" in value:
        raise ValueError(_NOT_JINJA)
    file = packaged(value) if value.startswith("package:") else expanded(value)
    if not (file.is_file() or "/" in value or file.suffix.lower() in ENDINGS):
        raise ValueError(_NOT_JINJA)
    if not file.is_file():
        folder = file.parent
        there = sorted(one.name for one in folder.iterdir() if one.is_file()) if folder.is_dir() else []
        raise ValueError(f"there is no file {file}.{nearest(file.name, there)} Give a template, or its file")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file {file} cannot be read as UTF-8 text ({error})") from error
    if not _is_jinja(text):
        raise ValueError(f"the file {file} has no jinja ({{{{ ... }}}} or {{% ... %}}): every prompt would be the same")
    return text


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text
