"""The long description of a package index: the README, whose relative links lead nowhere there.

Everything else is in pyproject.toml. With OPD_REPOSITORY, the address of the repository's files of this version (e.g.
https://HOST/OWNER/opd/blob/v0.1.0), relative links become absolute. Without it their text stays and the link goes.
"""

import os
import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def long_description(readme: str, repository: str) -> str:
    """The README's text without relative links. An image without a repository is left out."""

    def _absolute(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if not repository:
            return "" if image else text
        return f"{image}[{text}]({repository.rstrip('/')}/{path}{'?raw=true' if image else ''})"

    return LINK.sub(_absolute, readme)


setup(
    long_description=long_description(
        (Path(__file__).parent / "README.md").read_text(encoding="utf-8"), os.environ.get("OPD_REPOSITORY", "")
    ),
    long_description_content_type="text/markdown",
)
