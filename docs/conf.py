"""The site of these pages, for Sphinx: `make site`. Nothing is fetched while it is built or read."""

import re

from sphinx.application import Sphinx

project = "opd"
html_title = "opd: on-policy distillation"
extensions = ["myst_parser"]
nitpicky = True  # a link without a target is a warning, and `make site` makes warnings errors

myst_heading_anchors = 4
myst_heading_slug_func = "github"

html_theme = "furo"
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def navigation(_app: Sphinx, page: str, source: list[str]) -> None:
    """Add the tables of contents, which the pages themselves have as lists of links that GitHub shows too."""
    if page == "index":
        for section in source[0].split("\n## ")[1:]:
            title, _, text = section.partition("\n")
            source[0] += contents(re.findall(r"^- \[[^\]]*\]\((\S+)\.md\)", text, re.MULTILINE), title)
    elif page == "studies":
        source[0] += contents(["studies/*"])


def contents(pages: list[str], title: str = "") -> str:
    """A hidden table of contents: the section of the navigation with this title."""
    caption = [f":caption: {title}"] if title else []
    return "\n".join(["\n\n```{toctree}", ":hidden:", ":glob:", *caption, "", *pages, "```\n"])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", navigation)
