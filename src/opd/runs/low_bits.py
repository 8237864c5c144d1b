"""What a recipe's 4-bit models and 8-bit moments need: adapters, one process, bitsandbytes. No weights are loaded."""

from __future__ import annotations

from importlib.util import find_spec

from opd.errors import ConfigError
from opd.recipe.schema import Recipe, StageSpec
from opd.runs.prepare import Given
from opd.runs.saves import read_later, trains_adapter


def check_low_bits(recipe: Recipe, spec: StageSpec, given: Given, processes: int) -> None:
    """Refuse what bitsandbytes cannot do, before weights are loaded.

    Raises ConfigError: it is not installed; several processes; a 4-bit student without an adapter, or one that a later
    stage reads.
    """
    names = [name for name in spec.models if name not in given.models and recipe.models[name].quantization is not None]
    eight = ["optimizer.name: adamw_8bit"] if spec.optimizer.name == "adamw_8bit" else []
    uses = [*(f"models.{name}.quantization" for name in names), *eight]
    if uses and (missing := [one for one in ("bitsandbytes", "accelerate") if find_spec(one) is None]):
        raise ConfigError(
            f"Stage {spec.name!r}: {uses[0]} needs {' and '.join(missing)}. Install with: "
            "pip install 'opd[quantization]', or leave it out."
        )
    where = f"Stage {spec.name!r}"
    if processes > 1 and uses:
        raise ConfigError(
            f"{where}: {uses[0]} with {processes} processes. bitsandbytes keeps weights and moments whole. "
            "Use one process, or leave it out."
        )
    if spec.train not in names:
        return
    if not trains_adapter(recipe, spec, given.models):
        raise ConfigError(
            f"{where} trains {spec.train!r}, whose weights have 4 bits and get no gradient. Give "
            f"models.{spec.train} a `lora` section, or leave `quantization` out."
        )
    if read_later(recipe, spec):
        raise ConfigError(
            f"{where} trains {spec.train!r} over 4-bit weights, and a later stage begins with the result. Its weights "
            "would be rounded to 4 bits again: another model. Leave `quantization` out, or train in one stage."
        )
