"""The recipes that the package holds, by name. Reads their text; no torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from opd.errors import ConfigError, RunError, nearest
from opd.files import expanded, write_atomically
from opd.plugins import packaged
from opd.recipe.yaml_text import read_file

FOLDER = Path(__file__).parents[1] / "recipes"  # in the repository a link to recipes/
SCHEMA = Path(__file__).parents[1] / "assets" / "recipe.schema.json"
ENDINGS = (".yaml", ".yml")
_MINUTES = re.compile(r"^# Takes ([\d.]+) CPU minutes", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A recipe of the package: the methods of its stages, and the minutes that its header states."""

    name: str
    methods: tuple[str, ...]
    description: str
    minutes: float | None  # of one core


def names() -> list[str]:
    """The names of the package's recipes, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def listed() -> list[Listed]:
    """What each recipe of the package is, in the order of the names."""
    return [_listed(FOLDER / f"{name}.yaml") for name in names()]


def _listed(file: Path) -> Listed:
    tree, _ = read_file(file)
    stated = _MINUTES.search(file.read_text(encoding="utf-8"))
    return Listed(
        name=file.stem,
        methods=tuple(dict.fromkeys(stage["method"] for stage in tree["stages"])),
        description=tree["description"],
        minutes=float(stated[1]) if stated else None,
    )


def recipe_file(text: str | Path) -> Path:
    """The file of a recipe: a path, `package:NAME/FILE`, or the name of a recipe in the package.

    A text with a slash or an ending (.yaml, .yml) is a path. A name that is also a file of the working folder, with or
    without the ending, is refused unless both are the same text.

    Raises ConfigError for a missing file and for such a name, DataError for a missing file of a package.
    """
    if str(text).startswith("package:"):
        return packaged(str(text))
    path = expanded(text)
    is_name = isinstance(text, str) and text in names()
    ours = FOLDER / f"{text}.yaml"
    for beside in (path, *(path.with_name(f"{path.name}{ending}") for ending in ENDINGS)) if is_name else ():
        if beside.is_file() and beside.read_bytes() != ours.read_bytes():
            raise ConfigError(
                f"{text!r} is a recipe of the package, and {beside} is another recipe in this folder. Write "
                f"./{beside} for the file, or package:opd/recipes/{text}.yaml for the package's."
            )
    if is_name:
        return ours
    if not path.is_file():
        raise ConfigError(_missing(path, str(text)))
    return path


def _missing(path: Path, text: str) -> str:
    """What to say about a path without a file; a plain name may be that of a recipe in the package."""
    there = [p.name for ending in ENDINGS for p in path.parent.glob(f"*{ending}")] if path.parent.is_dir() else []
    if path.suffix in ENDINGS or "/" in text:
        return f"There is no recipe at {path}.{nearest(path.name, there)} Give the path of a YAML file."
    near = nearest(f"{text}.yaml", there) or nearest(text, names())
    return (
        f"There is no recipe at {path}, and none of that name in the package.{near} Give the path of a YAML file, or a "
        "name that `opd recipes` lists."
    )


def copy(name: str, folder: Path) -> list[Path]:
    """Write a recipe of the package into a folder, and beside it the schema that its first line names.

    Returns the files written. Raises ConfigError for an unknown name, RunError for a file that exists.
    """
    if name not in names():
        raise ConfigError(
            f"There is no recipe {name!r} in the package.{nearest(name, names())} There are: {', '.join(names())}."
        )
    file = folder / f"{name}.yaml"
    if file.exists():
        raise RunError(f"{file} exists. Rename it, or copy in another folder: nothing was written.")
    write_atomically(file, (FOLDER / f"{name}.yaml").read_bytes())
    return [file, *write_schema(folder)]


def write_schema(folder: Path) -> list[Path]:
    """Write the schema into a folder unless the file is there; returns what was written. Raises RunError."""
    file = folder / SCHEMA.name
    if file.exists():
        return []
    write_atomically(file, SCHEMA.read_bytes())
    return [file]
