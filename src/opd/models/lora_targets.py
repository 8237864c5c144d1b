"""The modules that LoRA adapts, found in a model before they are adapted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from opd.errors import ConfigError, nearest
from opd.plugins import torch

if TYPE_CHECKING:
    from torch import nn


def check_targets(model: nn.Module, target_modules: str | list[str], where: str) -> None:
    """Refuse target modules that the model does not have; peft passes over one name among others. Raises ConfigError.

    As in peft, a list holds names of modules or the ends of names, and a text is one regular expression for all.
    """
    if target_modules == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    kinds = sorted({name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)})
    if isinstance(target_modules, str):
        try:
            missing = [] if any(re.fullmatch(target_modules, name) for name in names) else [target_modules]
        except re.error as error:
            raise ConfigError(
                f"{where}: target_modules is the regular expression {target_modules!r}, which does not compile: "
                f"{error}. Correct it, or give a list of names: [{', '.join(kinds)}]."
            ) from error
    else:
        missing = [one for one in target_modules if not any(name == one or name.endswith(f".{one}") for name in names)]
    if missing:
        as_list = " A text is one regular expression for whole names." if isinstance(target_modules, str) else ""
        raise ConfigError(
            f"{where}: the model has no module {' and no module '.join(map(repr, missing))} (target_modules)."
            f"{nearest(missing[0], kinds)}{as_list} Give a list of names, of: {', '.join(kinds)}; or `all-linear`."
        )
