"""The steps of responses that are drawn outside of training."""

from opd.samplers.hf import uniforms_of
from opd.types import ReservedStep


def test_reserved_step_values_are_fixed():
    assert ReservedStep.EVALUATION == 2**31 - 1
    assert ReservedStep.VALIDATION == 2**31 - 2


def test_reserved_steps_differ_in_value_and_draws():
    members = ReservedStep.__members__.values()  # an alias, of an equal value, is one of these and no other step
    assert len({int(step) for step in members}) == len(members) == 6
    draws = [tuple(uniforms_of((0, step), 7, 0, 4).tolist()) for step in members]
    assert len(set(draws)) == 6
    assert draws == [tuple(uniforms_of((0, int(step)), 7, 0, 4).tolist()) for step in members]
