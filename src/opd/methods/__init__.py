"""Published methods, one file each, and their registry.

A method is a function that returns a `Method`; its signature is the schema of its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from opd.errors import ConfigError, nearest
from opd.method import Method
from opd.methods.anti_sd import anti_sd
from opd.methods.brts import brts
from opd.methods.combine import combined
from opd.methods.context_distillation import context_distillation
from opd.methods.copd import copd
from opd.methods.eff_opd import eff_opd
from opd.methods.extrapolated_opd import extrapolated_opd
from opd.methods.forward_kl import forward_kl
from opd.methods.gkd import gkd
from opd.methods.grpo import grpo
from opd.methods.gui_sd import gui_sd
from opd.methods.iw_opd import iw_opd
from opd.methods.local_support_matching import local_support_matching
from opd.methods.mad_opd import mad_opd
from opd.methods.mopd import mopd
from opd.methods.opd import opd
from opd.methods.opsd import opsd
from opd.methods.prune_opd import prune_opd
from opd.methods.rethinking_opd import rethinking_opd
from opd.methods.reverse_kl import reverse_kl
from opd.methods.ropd import ropd
from opd.methods.sdft import sdft
from opd.methods.sdpo import sdpo
from opd.methods.sft import sft
from opd.methods.simct import simct
from opd.methods.sod import sod
from opd.methods.tcod import tcod
from opd.methods.top_d import top_d
from opd.methods.topk_forward_kl import topk_forward_kl
from opd.methods.topk_reverse_kl import topk_reverse_kl
from opd.methods.uld import uld
from opd.methods.uni_opd import uni_opd
from opd.methods.visd import visd
from opd.methods.vopd import vopd
from opd.plugins import import_function

METHODS: dict[str, Callable[..., Method]] = {
    "sft": sft,
    "grpo": grpo,
    "opd": opd,
    "gkd": gkd,
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "topk_reverse_kl": topk_reverse_kl,
    "topk_forward_kl": topk_forward_kl,
    "rethinking_opd": rethinking_opd,
    "local_support_matching": local_support_matching,
    "context_distillation": context_distillation,
    "opsd": opsd,
    "sdft": sdft,
    "sdpo": sdpo,
    "vopd": vopd,
    "iw_opd": iw_opd,
    "top_d": top_d,
    "mopd": mopd,
    "eff_opd": eff_opd,
    "extrapolated_opd": extrapolated_opd,
    "anti_sd": anti_sd,
    "visd": visd,
    "gui_sd": gui_sd,
    "uni_opd": uni_opd,
    "ropd": ropd,
    "prune_opd": prune_opd,
    "brts": brts,
    "copd": copd,
    "sod": sod,
    "tcod": tcod,
    "simct": simct,
    "uld": uld,
    "mad_opd": mad_opd,
}


def function_of(name: str) -> Callable[..., Method]:
    """The function of a method's name, or of `my_package.mine:method`. Raises ConfigError."""
    if ":" in name:
        return import_function(name)
    if name not in METHODS:
        raise ConfigError(
            f"There is no method {name!r}.{nearest(name, METHODS)} Known: {', '.join(METHODS)}; name your own as "
            "my_package.mine:method."
        )
    return METHODS[name]


def build(name: str | Callable[..., Method], options: Mapping[str, Any]) -> Method:
    """The Method of that name, or of a function, with options checked against the signature.

    Names joined by `+` combine methods, with options by name: `build("vopd+eff_opd", {"vopd": {"k": 20}})`. Raises
    ConfigError for an unknown name, invalid options, and methods that cannot be combined.
    """
    if isinstance(name, str) and "+" in name:
        return _combination(name, options)
    function = function_of(name) if isinstance(name, str) else name
    name = name if isinstance(name, str) else function.__name__
    signature = inspect.signature(function)
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, SyntaxError, AttributeError) as error:
        raise ConfigError(f"Method {name!r}: a type in its signature cannot be read: {error}. Correct it.") from error
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
        for p in signature.parameters.values()
    }
    own = function not in METHODS.values()  # whose options may be infinite
    schema = create_model("Options", __config__=ConfigDict(extra="forbid", strict=False, allow_inf_nan=own), **fields)
    booleans = [key for key, value in options.items() if isinstance(value, bool) and not _takes_booleans(hints, key)]
    if booleans:  # pydantic would read them as 1 and 0
        raise ConfigError(f"Method {name!r}:\n  option `{booleans[0]}` is a number (got {options[booleans[0]]})")
    try:
        checked = schema.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(_explain(name, error, list(fields))) from error
    method: Any = function(**{key: getattr(checked, key) for key in fields})
    if not isinstance(method, Method):
        raise ConfigError(f"Method {name!r} returned a {type(method).__name__}; it must return an opd.method.Method.")
    return method


def _takes_booleans(hints: Mapping[str, Any], key: str) -> bool:
    """Whether an option may be true or false, or is not a number."""
    kinds = (hints.get(key, Any), *get_args(hints.get(key, Any)))
    return bool in kinds or not {int, float} & {kind for kind in kinds if isinstance(kind, type)}


def _combination(name: str, options: Mapping[str, Any]) -> Method:
    names = [part.strip() for part in name.split("+")]
    if unknown := [key for key in options if key not in names]:
        raise ConfigError(
            f"Method {name!r} combines several methods and takes its options by method; got {', '.join(unknown)}. "
            f"Write e.g. options: {{{names[0]}: {{...}}}}."
        )
    wrong = [key for key, value in options.items() if not isinstance(value, Mapping | None)]
    if wrong:
        raise ConfigError(
            f"Method {name!r}: the options of {wrong[0]} are {options[wrong[0]]!r:.80}. Give a mapping, e.g. "
            f"options: {{{wrong[0]}: {{k: 20}}}}."
        )
    method = build(names[0], options.get(names[0]) or {})
    for i, part in enumerate(names[1:], 1):
        method = combined(method, build(part, options.get(part) or {}), (" + ".join(names[:i]), part))
    return method


def _explain(name: str, error: ValidationError, known: list[str]) -> str:
    lines: list[str] = []
    for one in error.errors():
        key = ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            lines.append(f"unknown option `{key}`.{nearest(key, known)} Known: {', '.join(known) or 'none'}")
        elif one["type"] == "missing":
            lines.append(f"option `{key}` is missing")
        else:
            lines.append(f"option `{key}`: {one['msg']} (got {one['input']!r})")
    return f"Method {name!r}:\n  " + "\n  ".join(lines)
