"""The weight of early tokens: against the oracle, without scale, and what is refused."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
from support.models import scored_rows

from opd import methods
from opd.errors import ConfigError
from opd.pieces.credit import early
from opd.types import Batch

TRAINED = [[True, False, True, True], [True], [False, True, True]]


def scored() -> Batch:
    return scored_rows(methods.build("iw_opd", {}), TRAINED)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_early_equals_oracle_on_trained_tokens(gamma: float):
    batch = scored()
    got = early(gamma)(batch)
    for row, trained in enumerate(TRAINED):
        kept = [t for t, one in enumerate(trained) if one]
        ratios = [float(batch.teacher_logp[row, t] - batch.policy_logp[row, t]) for t in kept]
        assert got[row, kept].tolist() == pytest.approx(oracle.early(ratios, gamma), rel=1e-5)
    assert bool((got[~batch.mask] == 0).all())


def test_early_weights_fall_from_one_plus_gamma():
    batch = scored()
    weights = (early(0.5)(batch) / early(0.0)(batch))[0, [0, 2, 3]].tolist()
    assert weights[0] == pytest.approx(1.5)
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] > 1.0


@pytest.mark.parametrize("options", [{"gamma": -0.1}, {"epsilon": 0.0}])
def test_iw_opd_refuses_options(options: dict[str, Any]):
    with pytest.raises(ConfigError, match="gamma of at least 0 and an epsilon above 0"):
        methods.build("iw_opd", options)
