"""Whole runs beside faulty servers of the tests' own: no step and no number is lost, and each fault is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.faults import FAULTS, Ended, Fault, Servers, check, outcome, own_servers

from opd.engines.replicas import Replicas
from opd.parallel import World
from opd.recipe.schema import EngineSection, ServerSection
from opd.runs import served


@pytest.fixture(scope="module")
def servers(models: Path) -> Iterator[Servers]:
    with own_servers(models) as found:
        yield found


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    made = served.replicas_of

    def quick(section: ServerSection | EngineSection, *world: World) -> Replicas:
        found = made(section, *world)
        return replace(found, servers=tuple(replace(one, backoff_s=0.02) for one in found.servers), pause_s=0.02)

    monkeypatch.setattr(served, "replicas_of", quick)


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.side}: {fault.name}" for fault in FAULTS])
def test_run_loses_nothing_to_a_fault(
    servers: Servers, models: Path, wanted: dict[Any, Ended], tmp_path: Path, fault: Fault
):
    check(fault, outcome(fault, servers, models, tmp_path), wanted[fault.kind])
