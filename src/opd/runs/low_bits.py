"""What a recipe's 4-bit models and 8-bit moments need: adapters, one process, bitsandbytes. No weights are loaded."""

from __future__ import annotations

from opd.errors import ConfigError
from opd.recipe.schema import Recipe, StageSpec
from opd.runs.prepare import Given
from opd.runs.saves import read_later, trains_adapter


def check_low_bits(recipe: Recipe, spec: StageSpec, given: Given, processes: int) -> None:
    """Refuse what bitsandbytes cannot do, before weights are loaded.

    Raises ConfigError: it is not installed; several processes; a 4-bit student without an adapter, or one that a later
    stage reads.
    """
    from opd.models.quantised import check_installed
    from opd.stage.optimisers import check_8bit

    names = [name for name in spec.models if name not in given.models and recipe.models[name].quantization is not None]
    for name in names:
        check_installed(f"models.{name}")
    if spec.optimizer.name == "adamw_8bit":
        check_8bit()
    where = f"Stage {spec.name!r}"
    if processes > 1 and (names or spec.optimizer.name == "adamw_8bit"):
        what = f"models.{names[0]}.quantization" if names else "optimizer.name: adamw_8bit"
        raise ConfigError(
            f"{where}: {what} with {processes} processes. bitsandbytes has no shards of its weights and moments here. "
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
