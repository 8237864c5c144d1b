"""The tools, and what becomes of those that misbehave."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from support import bad_tools
from support.models import byte_tokenizer

from opd.environments.acting import Limits, acted, cleaner_of
from opd.environments.calculator import BITS, calculator
from opd.environments.protocol import Call, Environment, Observation, Turn
from opd.environments.python_tool import PythonTool
from opd.environments.tools import Tools, as_text, tools_of
from opd.errors import ConfigError
from opd.types import Prompt

# --- the calculator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1+2*3", "7"),
        ("2*(3+4)", "14"),
        ("2^10", "1024"),
        ("7//2", "3"),
        ("-7 % 3", "2"),
        ("10/4", "2.5"),
        ("10/5", "2"),
        ("1e3", "1000"),
        ("sqrt(2)", str(math.sqrt(2))),
        ("max(1, 2, 3) - abs(-4)", "-1"),
        ("6 \u00d7 7 \u2212 2", "40"),
        ("2**-1", "0.5"),
        (" 12 ", "12"),
        ("(1)**(10**9)", "1"),
    ],
)
def test_calculator_computes(expression: str, expected: str):
    assert calculator(expression) == expected


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("__import__('os').system('true')", "is not computed"),
        ("(1).real", "is not computed"),
        ("[1 for _ in (1,)]", "is not computed"),
        ("True + 1", "is not computed"),
        ("'a'*3", "is not computed"),
        ("lambda: 1", "is not computed"),
        ("x", "is not computed"),
        ("1 +", "is no arithmetic expression"),
        ("", "is no arithmetic expression"),
        ("1\n2", "is no arithmetic expression"),
        ("9**9**9", f"more than {BITS} bits"),
        ("10**10000", f"more than {BITS} bits"),
        ("(2**4000)*(2**4000)", f"more than {BITS} bits"),
        ("1e308*10", "not a finite number"),
        ("1+" * 400 + "1", "at most 500"),
        ("-" * 200 + "1", "nested"),
        ("1/0", "division by zero"),
        ("2.0**10000", "range"),
        ("sqrt(-1)", ""),
        ("max()", ""),
    ],
)
def test_calculator_refuses(expression: str, why: str):
    started = time.monotonic()
    with pytest.raises((ValueError, ArithmeticError, TypeError)) as error:
        calculator(expression)
    assert why in str(error.value)
    assert time.monotonic() - started < 1


# --- the python tool ------------------------------------------------------------------------------------------------


def test_python_tool_prints_the_result():
    assert PythonTool()("import math\nprint(math.factorial(10))") == "3628800"
    assert PythonTool()("x = 1") == "(no output: print the result)"
    assert PythonTool()("open('a.txt', 'w').write('1')\nprint(open('a.txt').read())") == "1"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1/0", "ZeroDivisionError: division by zero (line 1)"),
        ("def f(:", "SyntaxError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 1))", "does not allow socket."),
        ("open('/etc/passwd').read()", "does not allow the file /etc/passwd"),
        ("open('../out.txt', 'w')", "does not allow the file"),
        ("import subprocess\nsubprocess.run(['true'])", "does not allow subprocess.Popen"),
        ("import os\nos.system('true')", "does not allow os.system"),
        ("import os\nos.fork()", "does not allow os.fork"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("open('a', 'w').write('a' * 10**6)", "File too large"),
        ("raise SystemExit(3)", "(no output: print the result)"),
    ],
)
def test_python_tool_refuses(code: str, expected: str):
    assert expected in PythonTool()(code)


def test_python_tool_ends_what_does_not_end():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took longer than 0\.5 s"):
        PythonTool(timeout_s=0.5)("while True: pass")
    assert time.monotonic() - started < 10


def test_python_tool_output_is_bounded():
    assert len(PythonTool()("print('a' * 10**7)")) <= 66_000


def test_python_tool_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_KEY", "abc")
    assert PythonTool()("import os\nprint(os.environ.get('SECRET_KEY'), os.listdir('.'))") == "None []"
    assert PythonTool()("import os\nprint(os.listdir('.'))") == "[]"


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"memory_mib": 1}, {"timeout_s": 1e9}])
def test_python_tool_refuses_limits(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"`timeout_s` above 0 and at most 3600 and a `memory_mib` of at least 64"):
        PythonTool(**options)


# --- calls ----------------------------------------------------------------------------------------------------------

LIMITS = Limits(timeout_s=0.5)


def called(*names: str, call: Call | None = None, **options: Any) -> Observation:
    """One call of the first tool, as a conversation makes it, and its observation cleaned."""
    tools = tools_of(names, options, "stage")
    state = tools.begin(Prompt(id=0, content="x"), seed=(0, 0, 0, 0)).state
    first = str(tools.tools[0]["function"]["name"])
    made = call or Call(name=first, arguments={"text": "a"})
    return acted(tools, state, Turn(text="", calls=(made,)), LIMITS)


BAD = [
    ("bad_tools:raises", "error: KeyError: 'a'", "tool_errors"),
    ("bad_tools:leaves", "error: SystemExit: 3", "tool_errors"),
    ("bad_tools:hangs", "error: it took longer than 0.5 s", "timeouts"),
    ("bad_tools:moves", "error: it took longer than 0.5 s", "timeouts"),
    ("bad_tools:shouts", "zzz", "printed"),
    ("bad_tools:codes", "\x1b[2J", None),
    ("bad_tools:returns_number", "NaN", None),
    ("bad_tools:returns_nothing", "null", None),
    ("bad_tools:returns_object", "error: ValueError: not shown", "tool_errors"),
]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(bad_tools.__file__).parent))


@pytest.mark.parametrize(("reference", "says", "counted"), BAD)
def test_bad_tool_is_an_observation(reference: str, says: str, counted: str | None, capfd: pytest.CaptureFixture[str]):
    here = Path.cwd()
    found = called(reference)
    assert found.texts[0].startswith(says)
    assert not found.done
    if counted is not None:
        assert found.counts[counted] == 1
    assert Path.cwd() == here
    out, err = capfd.readouterr()
    assert out == err == ""


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (Call(name="calculater", arguments={}), "error: no tool 'calculater'. Did you mean 'calculator'? Tools: calc"),
        (Call(name="calculator", arguments={"expresion": "1"}), "error: TypeError"),
        (Call(name="calculator", arguments={"expression": {"a": 1}}), "error: ValueError"),
        (Call(name="calculator", arguments={}), "error: TypeError"),
        (Call(name="calculator", arguments="1+1"), "2"),
        (Call(name="x" * 10**5, arguments={}), "error: no tool 'xxx"),
    ],
)
def test_call_with_wrong_arguments_is_an_observation(call: Call, says: str):
    found = called("calculator", call=call)
    assert found.texts[0].startswith(says)
    assert len(found.texts[0]) < 400


def test_observations_are_cleaned():
    clean = cleaner_of(byte_tokenizer(), 20)
    text, counts = clean(bad_tools.codes("a"))
    assert "<eos>" not in text
    assert "\x1b" not in text
    assert "\x00" not in text
    assert counts == {"cleaned": 1}
    text, counts = clean("z" * 10**6)
    assert text == "z" * 20 + "... (999980 more characters)"
    assert counts == {"cut": 1}
    assert clean("plain\n") == ("plain\n", {})


def test_class_is_made_anew_for_each_conversation():
    tools = tools_of(["bad_tools:Counter"], {"Counter": {"first": 5}}, "stage")
    states = [tools.begin(Prompt(id=0, content="x"), seed=(0, 0, 0, i)).state for i in range(2)]
    turn = Turn(text="", calls=(Call(name="Counter", arguments={"text": "a"}),) * 2)
    assert acted(tools, states[0], turn, LIMITS).texts == ("6", "7")
    assert acted(tools, states[1], turn, LIMITS).texts == ("6", "7")
    assert acted(tools, states[0], turn, LIMITS).texts == ("8", "9")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("text", "error: the environment returned a str, not an Observation"),
        (None, "error: the environment returned a NoneType, not an Observation"),
        (Observation(text="1", reward=math.nan), "error: the environment's reward is nan, not a finite number"),
        (Observation(text="1", reward="1"), "error: the environment's reward is '1', not a finite number"),  # type: ignore[arg-type]
        (Observation(text=b"1"), "error: the environment's observation is no text"),  # type: ignore[arg-type]
    ],
)
def test_wrong_answer_of_environment_is_an_observation(answer: Any, says: str):
    found = acted(bad_tools.NoAnswer(answer), None, Turn(text="a"), LIMITS)
    assert found.text == says
    assert found.counts["errors"] == 1


def test_environment_keeps_interrupts_of_the_run():
    class Stops(Environment):
        def act(self, state: Any, turn: Turn) -> Observation:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acted(Stops(), None, Turn(text="a"), LIMITS)


def test_turn_without_a_call_ends_the_conversation():
    tools: Tools = tools_of(["calculator"], {}, "stage")
    assert tools.act({}, Turn(text="4")).done
    assert not tools.act({}, Turn(text="4", unreadable="no JSON")).done


def test_row_chooses_among_the_tools():
    tools = tools_of(["calculator", "python"], {}, "stage")
    chosen = Prompt(id=3, content="x", tools=(tools.tools[0],))
    assert list(tools.begin(chosen, seed=(0, 0, 0, 0)).state) == ["calculator"]
    other = Prompt(id=3, content="x", tools=({"type": "function", "function": {"name": "search"}},))
    with pytest.raises(ConfigError, match=r"prompt 3 offers the tool 'search', which the environment does not have"):
        tools.begin(other, seed=(0, 0, 0, 0))


def test_schemas_are_those_of_transformers():
    (schema,) = tools_of(["calculator"], {}, "stage").tools
    assert schema["function"]["name"] == "calculator"
    assert schema["function"]["parameters"]["required"] == ["expression"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("waits", "is a coroutine or a generator, and a call of it gives no answer"),
        ("Waits", "is a coroutine or a generator"),
        ("yields", "is a coroutine or a generator"),
        ("any_number", "has the parameter `*texts`, and a call gives each argument by its name"),
        ("any_name", "has the parameter `**texts`"),
        ("by_place", "has the parameter `text, /`"),
        ("paints", "`colours` is the enum Colour, of which a call gives the value, a text. Give `typing.Literal`"),
    ],
)
def test_tool_that_no_call_can_reach_is_refused(name: str, why: str):
    """Each passed, and every call of it failed, or gave the text of an object."""
    with pytest.raises(ConfigError) as error:
        tools_of([f"bad_tools:{name}"], {}, "stage 'x'")
    assert f"stage 'x': the tool bad_tools:{name}" in str(error.value)
    assert why in str(error.value)
    assert ".." not in str(error.value)


def test_enum_of_texts_is_a_text():
    assert called("bad_tools:measures", call=Call(name="measures", arguments={"size": "small"})).texts == ("small",)


def test_answers_are_the_same_in_every_run():
    """An address and the order of a set differ from run to run, and so would what the student reads."""
    (said,) = called("bad_tools:returns_address").texts
    assert said == "error: TypeError: the tool returned a list, which has no text"
    assert called("bad_tools:returns_set").texts == ('["a"]',)
    assert as_text({"b", "a", "c"}) == '["a", "b", "c"]'
    assert as_text({1, 2}) == "[1, 2]"
