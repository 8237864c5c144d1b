"""Whole runs beside real vLLM servers with a faulty proxy before them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.faults import FAULTS, Ended, Fault, Servers, check, outcome, real_servers, row
from support.vllm_server import needs_vllm

pytestmark = [pytest.mark.engine, needs_vllm]


@pytest.fixture(scope="module")
def servers(models: Path) -> Iterator[Servers]:
    with real_servers(models) as found:
        yield found


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.side}: {fault.name}" for fault in FAULTS])
def test_run_loses_nothing_to_a_fault_before_vllm(
    servers: Servers, models: Path, wanted: dict[Any, Ended], tmp_path: Path, fault: Fault
):
    found = outcome(fault, servers, models, tmp_path)
    print(row(fault, found))
    check(fault, found, wanted[fault.kind])
