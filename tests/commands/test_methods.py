"""`opd methods` and `opd describe` read source: it says what the imported functions say, and no torch is imported."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

from opd.commands.methods import citations, description, headline, names, papers
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


@pytest.mark.parametrize("name", METHODS)
def test_citations_has_an_entry_for_each_paper(name: str):
    ids = set(re.findall(r"\b\d{4}\.\d{5}\b", sys.modules[METHODS[name].__module__].__doc__ or ""))
    assert ids
    assert ids <= set(papers())
    entries = citations(name).split("\n\n")
    assert {re.findall(r"eprint = \{(.+?)\}", entry)[0] for entry in entries} == ids
    for entry in entries:
        assert entry.count("{") == entry.count("}")
        assert "title = {{" in entry


def test_citations_names_a_paper_without_entry(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cited_method.py").write_text('"""After 2605.07865 and 1901.00001."""\ndef method(): ...\n')
    (tmp_path / "bare_method.py").write_text('"""Mine."""\ndef method(): ...\n')
    known, unknown = citations("cited_method:method").split("\n\n")
    assert "Control Variate" in known
    assert unknown == "% 1901.00001: https://arxiv.org/abs/1901.00001, no entry in opd's list"
    with pytest.raises(ConfigError, match="names no arXiv id"):
        citations("bare_method:method")
