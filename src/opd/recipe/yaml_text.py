"""YAML text to plain values, and the line of each value for messages.

PyYAML reads YAML 1.1. What that reads in an unexpected way is refused: a key given twice (the last one would win),
`010` (8) and `1:30` (90), keys that are not text, and anchors inside themselves. `1e-5` is a number, as in YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from opd.errors import ConfigError
from opd.files import is_unicode

Place: TypeAlias = tuple[str, ...]  # the keys and list positions that lead to a value

DEEPEST = 100  # levels
MOST = 100_000  # values, each as often as its aliases are used

_TAG = "tag:yaml.org,2002:"
_KEYS = (f"{_TAG}str", f"{_TAG}int", f"{_TAG}merge")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")  # YAML 1.1 wants a dot and a sign


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The origin of a recipe, for messages: a name, such as its file, the lines of its values, and the overrides."""

    name: str
    lines: Mapping[Place, int] = field(default_factory=dict[Place, int])
    overrides: Mapping[Place, str] = field(default_factory=dict[Place, str])

    def at(self, *place: int | str) -> str:
        """`FILE, line N` of a value; the name alone if no line is known."""
        where = self.where(place)
        return f"{self.name}, {where}" if where else self.name

    def where(self, place: Sequence[int | str]) -> str:
        """`line N` or `override KEY` of a value, or of the section that it is missing in; else the empty string.

        A value of a stage may come from `defaults`, and that of a task from its stage.
        """
        parts = tuple(map(str, place))
        for end in range(len(parts), 0, -1):
            if parts[:end] in self.overrides:
                return f"override {self.overrides[parts[:end]]}"
        found = [self._nearest(one) for one in _origins(parts)]
        exact = [line for last, line in found if last and line]
        line = exact[0] if exact else found[0][1]
        return f"line {line}" if line else ""

    def _nearest(self, parts: Place) -> tuple[bool, int]:
        """(whether the last part is known, the line of the last part that is known or 0). Others are left out.

        Unknown parts are the names of types that pydantic puts between keys.
        """
        known: Place = ()
        last = False
        for part in parts:
            last = (*known, part) in self.lines
            known = (*known, part) if last else known
        return last, self.lines.get(known, 0)

    def overridden(self, place: Place, key: str) -> Source:
        """The source with one more override, given as `key`."""
        return replace(self, overrides={**self.overrides, place: key})


def _origins(parts: Place) -> Iterator[Place]:
    """The places that a value of a recipe may come from, the first that has it wins."""
    yield parts
    if parts[:1] != ("stages",) or len(parts) < 3:
        return
    stage, rest = parts[:2], parts[2:]
    of_stage = rest[2:] if rest[0] == "tasks" else ()
    if of_stage:
        yield (*stage, *of_stage)
    yield ("defaults", *rest)
    if of_stage:
        yield ("defaults", *of_stage)


def read_file(file: Path) -> tuple[Any, Source]:
    """The value of a YAML file, and its lines. Raises ConfigError, which names the file and the line."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror or error}). Allow reading it.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file}, line {line}: the byte 0x{content[error.start]:02x} is not UTF-8 ({error.reason}). Save the file "
            "as UTF-8."
        ) from error
    return read_text(text, str(file))


def read_text(text: str, name: str) -> tuple[Any, Source]:
    """The value of a YAML text called `name`, and its lines. Raises ConfigError, which names the line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        if node is not None:
            _number(node, (), lines)
        return (None if node is None else loader.construct_document(node)), Source(name=name, lines=lines)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {_explained(error, text)}") from error


def write_text(value: Any) -> str:
    """The value as YAML that `read_text` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_value(text: str, where: str) -> Any:
    """The value of a key=value on the command line, parsed as YAML. Raises ConfigError."""
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        why = _explained(error, text).partition(": ")[2]
        raise ConfigError(f"{where}: {text!r} is not a YAML value: {why}. Quote it.") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader with the rules of this file."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[str | None] = []  # anchors of the nodes that are being composed

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open:
                raise ComposerError(None, None, f"the anchor {event.anchor!r} contains itself", event.start_mark)
            return super().compose_node(parent, index)
        if len(self._open) == DEEPEST:
            raise ComposerError(None, None, f"more than {DEEPEST} levels of nesting", event.start_mark)
        self._open.append(event.anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEYS:
                kind = "a list or a mapping" if not isinstance(key, yaml.ScalarNode) else f"a {key.tag[len(_TAG) :]}"
                raise ComposerError(None, None, f"a key is text, and this one is {kind}: quote it", key.start_mark)
            if key.value in first:
                why = f"the key {key.value!r} is given twice, first in line {first[key.value]}: remove one"
                raise ComposerError(None, None, why, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # of int(), float() and date()
            raise ConstructorError(None, None, str(error), node.start_mark) from error

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        kind = self.construct_yaml_int if node.tag == f"{_TAG}int" else self.construct_yaml_float
        value = kind(node)
        digits = str(node.value).replace("_", "").lstrip("+-")
        if ":" in digits or re.fullmatch(r"0[0-9]+", digits):
            base = "base 60" if ":" in digits else "base 8"
            why = f"{node.value} is the number {value} in YAML 1.1 ({base}): write that number, or quote a text"
            raise ConstructorError(None, None, why, node.start_mark)
        return value

    def construct_str(self, node: yaml.ScalarNode) -> str:
        value = str(self.construct_scalar(node))
        if not is_unicode(value):
            why = "a text holds half of a surrogate pair (\\ud800 to \\udfff): write the character itself"
            raise ConstructorError(None, None, why, node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(f"{_TAG}float", _NUMBER, list("-+.0123456789"))
for _tag in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_tag}", _Loader.construct_number)
_Loader.add_constructor(f"{_TAG}str", _Loader.construct_str)


def _number(node: yaml.Node, place: Place, lines: dict[Place, int]) -> None:
    """Fill `lines` with the lines of all values below a node."""
    if len(lines) > MOST:
        why = f"more than {MOST:,} values, counted as often as their aliases are used"
        raise ComposerError(None, None, why, node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*place, str(i))] = item.start_mark.line + 1
            _number(item, (*place, str(i)), lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in sorted(node.value, key=lambda pair: pair[0].tag != f"{_TAG}merge"):  # own keys over merged ones
        if key.tag == f"{_TAG}merge":
            for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _number(one, place, lines)
        else:
            lines[(*place, key.value)] = key.start_mark.line + 1
            _number(value, (*place, key.value), lines)


def _explained(error: yaml.YAMLError, text: str) -> str:
    """`line N, column M: what is wrong` of an error of PyYAML."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: the character U+{int(error.character):04X} is not allowed"
    mark: Any = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    context, problem = getattr(error, "context", None), getattr(error, "problem", None)
    why = ", ".join(part for part in (context, problem) if part) or str(error)
    return why if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {why}"
