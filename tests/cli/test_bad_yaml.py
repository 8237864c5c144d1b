"""Recipes whose YAML is damaged, or reads otherwise than it looks: refused with the file, the line and the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.runs import command, one_stage, prepare

from opd.recipe.load import dump, load_recipe, parse_recipe
from opd.recipe.yaml_text import parse_value, read_text, write_text

BASE = yaml.safe_dump(one_stage(), sort_keys=False)
STEPS = next(n for n, line in enumerate(BASE.splitlines(), start=1) if line.strip() == "steps: 2")
NEXT = BASE.count("\n") + 1


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    return Path()


def refused(content: bytes, *overrides: str) -> str:
    Path("bad.yaml").write_bytes(content)
    ended = command("check", "bad.yaml", *overrides)
    assert ended.code == 2, ended
    assert ended.err.startswith("ConfigError: ")
    assert not Path("run").exists()
    return ended.err


def with_steps(text: str) -> bytes:
    return BASE.replace("steps: 2\n", f"steps: {text}\n").encode()


BAD: dict[str, tuple[bytes, str]] = {
    "latin-1": (b"name: x\ndescription: caf\xe9\n", "bad.yaml, line 2: the byte 0xe9 is not UTF-8"),
    "utf-16": ("name: x".encode("utf-16"), "bad.yaml, line 1: the byte 0xff is not UTF-8"),
    "control character": (b"name: x\nseed: \x00", "line 2: the character U+0000 is not allowed"),
    "tab": (b"name: x\n\tseed: 1", "line 2, column 1: while scanning for the next token, found character '\\t'"),
    "two documents": (f"{BASE}---\n{BASE}".encode(), f"line {NEXT}, column 1: expected a single document"),
    "tag of Python": (b"name: !!python/object:os.system x\n", "line 1, column 7: could not determine a constructor"),
    "unknown alias": (b"name: *x\n", "line 1, column 7: found undefined alias 'x'"),
    "list in itself": (f"{BASE}description: &d [*d]\n".encode(), f"line {NEXT}, column 18: the anchor 'd' contains"),
    "mapping in itself": (b"name: x\nmodels: &m {a: *m}\n", "line 2, column 16: the anchor 'm' contains itself"),
    "deep": (b"name: " + b"[" * 3000 + b"]" * 3000, "line 1, column 106: more than 100 levels of nesting"),
    "aliases of aliases": (
        b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 10)) for n in range(ord("b"), ord("g"))),
        "more than 100,000 values",
    ),
    "key twice": (
        BASE.replace("  steps: 2\n", "  steps: 2\n  steps: 5\n").encode(),
        f"line {STEPS + 1}, column 3: the key 'steps' is given twice, first in line {STEPS}",
    ),
    "key twice at the top": (f"{BASE}name: other\n".encode(), f"line {NEXT}, column 1: the key 'name' is given twice"),
    "key twice in one line": (with_steps("2\n  options: {k: 1, k: 2}"), "the key 'k' is given twice"),
    "key is a list": (b"? [a, b]\n: 1\n", "line 1, column 3: a key is text, and this one is a list or a mapping"),
    "key is a truth": (b"on: 1\n", "line 1, column 1: a key is text, and this one is a bool: quote it"),
    "key is nothing": (b"~: 1\n", "line 1, column 1: a key is text, and this one is a null: quote it"),
    "merge of a number": (f"{BASE}<<: 5\n".encode(), f"line {NEXT}, column 5: while constructing a mapping"),
    "octal": (with_steps("010"), f"line {STEPS}, column 10: 010 is the number 8 in YAML 1.1 (base 8)"),
    "base 60": (with_steps("1:30"), f"line {STEPS}, column 10: 1:30 is the number 90 in YAML 1.1 (base 60)"),
    "base 60 with a point": (with_steps("1:30.5"), "1:30.5 is the number 90.5 in YAML 1.1 (base 60)"),
    "date that is none": (f"{BASE}description: 2024-13-45\n".encode(), f"line {NEXT}, column 14: month must be in 1"),
    "number that is none": (with_steps("!!int many"), f"line {STEPS}, column 10: invalid literal for int()"),
    "half a surrogate pair": (f'{BASE}description: "\\ud83d"\n'.encode(), f"line {NEXT}, column 14: a text holds half"),
}


@pytest.mark.parametrize("case", BAD)
def test_check_refuses_damaged_yaml(work: Path, case: str):
    content, said = BAD[case]
    assert said in refused(content), refused(content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("true", f"line {STEPS}: `stages.0.steps`: Input should be a number, not true or false (got True)"),
        ("many", f"line {STEPS}: `stages.0.steps`: Input should be a valid integer"),
        ("2024-01-01", f"line {STEPS}: `stages.0.steps`: Input should be a valid integer (got datetime.date"),
        ("2\n  stesp: 3", f"line {STEPS + 1}: unknown key `stages.0.stesp`. Did you mean 'steps'?"),
        ("2\n  sampling: {n: 0}", "the key 'sampling' is given twice"),
    ],
)
def test_check_names_line_of_wrong_value(work: Path, text: str, said: str):
    assert said in refused(with_steps(text))


def test_check_names_line_of_missing_key_and_wrong_name(work: Path):
    stage = 1 + BASE.splitlines().index("- name: distil")
    without = BASE.replace("  train: student\n", "").encode()
    assert f"line {stage}: `stages.0.train` is missing" in refused(without)
    train = next(n for n, line in enumerate(BASE.splitlines(), start=1) if line.strip() == "train: student")
    said = refused(BASE.replace("train: student", "train: studnt").encode())
    assert f"bad.yaml, line {train}: stage 'distil': `train: studnt` is not among the models" in said


def test_check_names_line_of_value_from_defaults_and_override(work: Path):
    """A value of a stage may come from `defaults`, and that of a task from its stage."""
    shared = f"{BASE}defaults:\n  optimizer: {{learning_rate: -1}}\n".encode()
    assert f"line {NEXT + 1}: `stages.0.optimizer.learning_rate`" in refused(shared)
    said = refused(shared, "optimizer.learning_rate=0")
    assert "override optimizer.learning_rate: `stages.0.optimizer.learning_rate`" in said
    tasks = (
        "name: x\nmodels: {m: {path: ./m}}\nstages:\n- name: s\n  train: m\n  method: sft\n  steps: 1\n"
        "  sampling: {n: 0}\n  tasks: {a: {data: {path: x.jsonl}}}\n"
    )
    assert "line 8: `stages.0.tasks.a.sampling.n`" in refused(tasks.encode())


def test_defaults_refuse_value_where_stage_has_mapping(work: Path):
    said = refused(f"{BASE}defaults: {{sampling: 5}}\n".encode())
    assert f"bad.yaml, line {NEXT}: defaults.sampling is 5, and another place gives a mapping" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=010", "010 is the number 8 in YAML 1.1 (base 8)"),
        ("steps=true", "override steps: `stages.0.steps`: Input should be a number, not true or false"),
        ("options={k: 1, k: 2}", "the key 'k' is given twice"),
        ("seed=&a [*a]", "the anchor 'a' contains itself"),
    ],
)
def test_check_refuses_override_as_it_refuses_file(work: Path, override: str, said: str):
    assert said in refused(BASE.encode(), override)


def test_recipe_reads_scientific_numbers_and_merges(work: Path):
    """`1e-5` is a text in YAML 1.1; own keys stand over merged ones."""
    assert parse_value("1e-5", "x") == 1e-5
    assert parse_value("[1E5, .5e1, -2.e+1, 1_000, 0x10, '1e5', 1e, e5]", "x") == [
        *(1e5, 5.0, -20.0, 1000, 16),
        *("1e5", "1e", "e5"),
    ]
    value, source = read_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n", "f")
    assert value["b"] == {"x": 1, "y": 3}
    assert (source.at("b", "x"), source.at("b", "y"), source.at("z")) == ("f, line 1", "f, line 4", "f")
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_recipe("bom.yaml") == load_recipe("recipe.yaml")


@pytest.mark.parametrize("value", ["1e-5", "010", "1:30", "true", "~", "é", 1e-5, 3, [1.5, {"a": None}]])
def test_written_yaml_reads_back_equal(value: object):
    assert read_text(write_text({"key": value}), "x")[0] == {"key": value}


def test_dump_reads_back_equal_when_text_looks_like_number():
    recipe = parse_recipe(one_stage() | {"description": "1e-5"})
    assert parse_recipe(read_text(dump(recipe), "x")[0]) == recipe
