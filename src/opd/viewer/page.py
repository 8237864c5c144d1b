"""One HTML file from the content of a run's stages: it loads nothing, and its policy lets no other script run.

All text of models, data and recipes is escaped: by the template in HTML, as JSON or compressed in elements that are no
script, and put into the page through text nodes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from opd.messages import visible
from opd.viewer.content import Content
from opd.viewer.pack import script_json, text_of

TEMPLATES = ("page", "head", "result", "compared", "run")
LIBRARY = "uPlot.iife.min.js"
SCRIPTS = (  # in this order, as one function
    *("base", "blocks", "colours", "card", "tokens", "charts", "where", "filters", "images", "responses", "start"),
)
SECTIONS = (("result", "Result"), ("curves", "Curves"), ("where", "Where"), ("responses", "Responses"), ("run", "Run"))


def render(
    title: str,
    runs: Sequence[Mapping[str, Any]],
    stages: Sequence[Content],
    *,
    first: int = 0,
    live: bool = False,
    scripts: Sequence[str] = (),
) -> str:
    """The page as text. `runs` are `content.run_shown` of each run, with a `label` if there are several.

    `first`: the place of the stage that is shown at first.
    `live`: the page may load from where it came, and holds no blocks; `scripts` are names of further files of
    assets/ without `.js`, put before start.js.
    """
    css = asset("uPlot.min.css") + asset("page.css")
    js = asset(LIBRARY) + "\n" + script(scripts)
    rules = ["default-src 'none'", f"script-src {digest(js)}", f"style-src {digest(css)}", "img-src data:"]
    rules += ["connect-src 'self'"] if live else []
    blocks = [
        (f"{n}-{name}", Markup(text_of(block)))  # base64
        for n, content in enumerate(stages if not live else [])
        for name, block in content.blocks.items()
    ]
    return (
        environment()
        .get_template("page")
        .render(
            csp="; ".join([*rules, "base-uri 'none'", "form-action 'none'"]),
            title=title,
            description=runs[0].get("description", "") if len(runs) == 1 else "",
            version=runs[0].get("version", ""),
            css=Markup(css),
            js=Markup(js),
            data=Markup(script_json({"live": live, "first": first, "stages": [content.data for content in stages]})),
            blocks=blocks,
            runs=runs,
            stages=[content.shown for content in stages],
            sections=SECTIONS,
            live=live,
        )
    )


@cache
def asset(name: str) -> str:
    """A file of assets/ as text."""
    return files("opd.viewer").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """The templates, with escaping on; control characters of any text are written out."""

    def _shown(value: Any) -> Any:
        return visible(value) if type(value) is str else value  # not of Markup

    loader = DictLoader(
        {(name if name == "page" else f"{name}.html.j2"): asset(f"{name}.html.j2") for name in TEMPLATES}
    )
    return Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_shown,
    )


def script(more: Sequence[str] = ()) -> str:
    """The page's own script: the files of `SCRIPTS` as one function, `more` before the last of them."""
    names = [*SCRIPTS[:-1], *more, SCRIPTS[-1]]
    return '"use strict";\n(() => {\n' + "\n".join(asset(f"{name}.js") for name in names) + "})();\n"


def digest(text: str) -> str:
    """The hash by which a content security policy knows a script or a style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
