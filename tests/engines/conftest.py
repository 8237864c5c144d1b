"""What the tests of faults share: the models, and the runs of a module's servers without a fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.faults import KINDS, Ended, Servers, clean, models_in


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with models_in(tmp_path_factory.mktemp("models")) as one:
        yield one


@pytest.fixture(scope="module")
def wanted(servers: Servers, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Ended]:
    return clean(servers, models, tmp_path_factory.mktemp("clean"), KINDS)
