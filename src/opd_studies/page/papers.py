"""docs/methods.md: the methods' own pages, with a table of the papers that the library began with.

python -m opd_studies.page.papers > docs/methods.md
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.commands.methods import papers
from opd.methods.describe import markdown, recipes_of
from opd_studies.page import report
from opd_studies.page.outcome import VERDICTS


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper and what of it is built: methods, commands, recipes (beside those of the methods' names), and studies."""

    arxiv: str
    methods: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


# The three papers on when distillation works and why it fails, then the sixteen that add methods, in order of arXiv id.
PAPERS = (
    Paper("2605.11182", ("opd", "reverse_kl", "topk_reverse_kl", "context_distillation"), commands=("opd doctor",)),
    Paper("2604.13016", ("rethinking_opd",), ("cold_start", "reverse_distillation"), ("opd doctor", "opd compare")),
    Paper("2603.25562", ("opd", "local_support_matching")),
    Paper("2604.27083", ("copd",), ("copd_static",)),
    Paper("2605.00642", ("gui_sd",)),
    Paper("2605.01347", ("mad_opd",)),
    Paper("2605.03677", ("uni_opd",)),
    Paper("2605.06094", ("visd",), ("visd_frames",)),
    Paper("2605.07396", ("ropd",)),
    Paper("2605.07711", ("simct", "uld")),
    Paper("2605.07725", ("sod",)),
    Paper("2605.07804", ("prune_opd",)),
    Paper("2605.07865", ("vopd",)),
    Paper("2605.08737", ("extrapolated_opd",), commands=("opd doctor",)),
    Paper("2605.09725", ("brts",)),
    Paper("2605.10889", commands=("opd probe",)),
    Paper("2605.11609", ("anti_sd",)),
    Paper("2605.11739", ("eff_opd",)),
    Paper("2605.12483", ("forward_kl",), ("sparse_to_dense",)),
)

INTRODUCTION = """## From paper to verdict

What is built of the papers that the library began with. A verdict is a claim of the paper in a study here, judged by
its threshold ([studies.md](studies.md)); claims without a study are listed there too."""


def page(recipes: Path, docs: Path) -> str:
    """The text of docs/methods.md; `recipes` is the folder of recipes, `docs` the one of the studies' results.

    Raises ConfigError as `opd.methods.describe.markdown`, RunError for a damaged result.
    """
    from opd_studies import STUDIES

    head, mark, rest = markdown(recipes).partition("## Two methods in one")
    results = report.load(docs, list(STUDIES))
    return "\n".join([head.rstrip("\n"), "", INTRODUCTION, "", *table(results, recipes), "", mark + rest])


def table(results: Mapping[str, Mapping[str, Any]], recipes: Path) -> list[str]:
    """The lines of the table, a row per paper."""
    uses = recipes_of(recipes)
    lines = ["| paper | built as | recipe | studies, and their verdicts on its claims |", "|---|---|---|---|"]
    for one in PAPERS:
        built = [f"[`{name}`](#{name})" for name in one.methods] + [f"`{name}`" for name in one.commands]
        named = dict.fromkeys([*(recipe for name in one.methods for recipe in uses[name]), *one.recipes])
        found = verdicts_of(one.arxiv, results)
        counted = [f"[{name}](studies/{name}.md): {_counted(verdicts)}" for name, verdicts in found.items()]
        cells = (
            f"{title_of(one.arxiv)} ([{one.arxiv}](https://arxiv.org/abs/{one.arxiv}))",
            ", ".join(built),
            ", ".join(f"[`{name}`](../recipes/{name}.yaml)" for name in named),
            "; ".join(counted) or "none yet",
        )
        lines.append(report.row(cells))
    return lines


def verdicts_of(arxiv: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """By study, the verdicts of the claims that cite the paper."""
    found = {
        name: [one.verdict for one in result["findings"] if arxiv in one.citation] for name, result in results.items()
    }
    return {name: verdicts for name, verdicts in found.items() if verdicts}


def title_of(arxiv: str) -> str:
    """The paper's title in the list of citations."""
    found = re.search(r"title = \{\{(.*)\}\}", papers()[arxiv])
    assert found is not None, f"the entry of {arxiv} has no title"
    return found[1]


def _counted(verdicts: list[str]) -> str:
    counts = Counter(verdicts)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


if __name__ == "__main__":
    print(page(Path("recipes"), Path("docs")), end="")
