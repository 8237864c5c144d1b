"""`opd methods` and `opd describe` read source: it says what the imported functions say, and no torch is imported."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from opd.commands.methods import description, headline, names
from opd.errors import ConfigError
from opd.methods import METHODS
from opd.methods.describe import headline as imported_headline


def test_names_equal_registry():
    assert names() == tuple(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_description_has_page_and_options_of_the_function(name: str):
    text, function = description(name), METHODS[name]
    assert headline(name) == imported_headline(name)
    assert (sys.modules[function.__module__].__doc__ or "").strip() in text
    assert (inspect.getdoc(function) or "?") in text
    options = text.partition("Options:\n")[2].splitlines()
    parameters = inspect.signature(function).parameters.values()
    assert [line.strip().partition(":")[0] for line in options] == [one.name for one in parameters]
    assert [line.rpartition(" = ")[2] for line in options] == [repr(one.default) for one in parameters]
    assert not any(alias in line for line in options for alias in ("Average", "ChosenBy"))


def test_description_names_the_nearest_method():
    with pytest.raises(ConfigError, match=r"There is no method 'revers_kl'\. .*reverse_kl"):
        description("revers_kl")


def test_methods_and_describe_import_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from opd.cli import app; "
        "out = CliRunner().invoke(app, sys.argv[1:]); assert out.exit_code == 0, out.output; "
        "sys.exit('torch' in sys.modules)"
    )
    for arguments in (["methods"], ["describe", "reverse_kl"]):
        assert subprocess.run([sys.executable, "-c", code, *arguments], check=False).returncode == 0
