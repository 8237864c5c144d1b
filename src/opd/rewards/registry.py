"""Rewards by name, and users' rewards: a function (prompt, text) -> float, or a Reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from opd.errors import ConfigError, nearest
from opd.pieces.needs import columns_of
from opd.plugins import check_options, import_function
from opd.recipe.schema import MAX_FAILED, Asks, JudgeSection, RewardSection
from opd.rewards.base import FunctionReward, RewardFn
from opd.rewards.feedback import FeedbackReward
from opd.rewards.functions import exact, final_number, max_words, reasoning_gym, regex
from opd.rewards.mathematics import math_verify
from opd.rewards.rubric import rubric
from opd.rewards.trl_form import is_trl_form, one_at_a_time
from opd.samplers.asked.build import check_judge
from opd.types import Reward


def feedback(
    by: str = "exact",
    options: Mapping[str, Any] | None = None,
    limit: int = 1000,
    temperature: float = 0.7,
    judge: JudgeSection | None = None,
) -> FeedbackReward:
    """The reward `by`, one of a function, with its `options`, and feedback of a judge of up to `limit` characters.

    Raises ConfigError without a judge, for a reward of judges, and for a limit below 1.
    """
    if not isinstance(judge, JudgeSection):
        raise ConfigError(
            "The reward 'feedback' needs a judge, next to `options`: e.g. {url: http://localhost:8000/v1, model: NAME} "
            "or {function: my_package.mine:function}."
        )
    check_judge(judge, "The reward 'feedback', judge")
    if limit < 1 or temperature < 0:
        raise ConfigError(
            f"The reward 'feedback' has a `limit` of at least 1 character and a `temperature` of at least 0, got "
            f"{limit} and {temperature}."
        )
    inner = load_reward(by, options or {})
    if not isinstance(inner, FunctionReward):
        raise ConfigError(
            f"The reward 'feedback' takes its number from {by!r}, which needs judges or is a Reward of your own. Name "
            "a function (prompt, text) -> float."
        )
    return FeedbackReward(inner=inner, asks={"judge": judge}, needs=inner.needs, limit=limit, temperature=temperature)


REWARDS: dict[str, Callable[..., Reward]] = {
    "exact": exact,
    "regex": regex,
    "final_number": final_number,
    "max_words": max_words,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
    "rubric": rubric,
    "feedback": feedback,
}
MEMBERS = ("name", "needs", "asks", "comparable", "__call__", "for_stage", "check_failures", "pop_requests")


def load_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """A reward of `REWARDS`, or a user's, named `package.module:name`.

    The parameters of a built-in reward are its options. A user's name refers to a function, called (prompt, text,
    **options) for each response, or in TRL's form with lists of one; to a Reward; or to a function or class that has
    only options as parameters and returns one of these two. Raises ConfigError for an unknown name or option, for any
    other object, and for a package that is not installed.
    """
    if ":" in name:
        return _users(name, options)
    if name not in REWARDS:
        raise ConfigError(
            f"There is no reward {name!r}.{nearest(name, REWARDS)} There are: {', '.join(REWARDS)}, "
            "and your own as `my_package.mine:function`."
        )
    check_options(f"The reward {name!r}", REWARDS[name], options, beside=tuple(Asks.model_fields))
    return REWARDS[name](**options)


def reward_of(section: RewardSection) -> Reward:
    """The reward of a recipe's section. Raises as `load_reward`, and ConfigError for settings that have no effect."""
    reward = load_reward(section.name, {**section.options, **section.asks})
    if isinstance(reward, FunctionReward):
        if section.on_error == "stop" and section.max_failed != MAX_FAILED:
            raise ConfigError(
                f"The reward {section.name!r} got `max_failed: {section.max_failed:g}`, but its `on_error: stop` ends "
                "the run at the first failure. Set `on_error: drop`, or leave `max_failed` out."
            )
        return replace(reward, on_error=section.on_error, max_failed=section.max_failed, timeout_s=section.timeout_s)
    for_functions = ("on_error", "max_failed", "timeout_s")
    fields = RewardSection.model_fields
    given = [name for name in for_functions if getattr(section, name) != fields[name].default]
    if given:
        raise ConfigError(
            f"The reward {section.name!r} does not read {', '.join(given)}, which are for functions (prompt, text) -> "
            "float. Leave them out: judges have `retries`, `timeout_s` and `options.max_failed` of their own, and a "
            "Reward object sets `unjudged` of a rollout that it cannot reward."
        )
    return reward


def as_reward(given: Any, what: str = "The reward", name: str | None = None) -> Reward:
    """A Reward unchanged; a function as a Reward named `name` (default: the function's name).

    The function is (prompt, text) -> float, or has TRL's form: see `opd.rewards.trl_form`.
    Raises ConfigError, beginning with `what`, for anything else.
    """
    if _is_reward(given):
        return given
    own_name = getattr(given, "__name__", type(given).__name__)
    if is_trl_form(given):
        return one_at_a_time(given, name or own_name, {})
    if _is_function(given):
        return FunctionReward(name=name or own_name, function=given, needs=columns_of(given), undeclared=True)
    got = f"the class {given.__name__}" if inspect.isclass(given) else f"{given!r:.80} ({type(given).__name__})"
    lacks = [member for member in MEMBERS if not hasattr(given, member)]
    raise ConfigError(
        f"{what} is {got}, which is neither a function (prompt, text) -> float nor a Reward"
        + (f": a Reward also has {', '.join(lacks)}" if lacks and len(lacks) < len(MEMBERS) - 1 else "")
        + ". Give a function, or an object of a class that subclasses opd.types.Reward."
    )


def one_by_one(name: str) -> RewardFn:
    """The function (prompt, text) -> float of a reward, with its default options.

    Raises ConfigError for a reward that grades whole groups.
    """
    reward = load_reward(name, {})
    if not isinstance(reward, FunctionReward):
        raise ConfigError(f"Reward {name!r} grades all responses to a prompt at once. Use one that grades one by one.")
    return reward.function


def _users(name: str, options: Mapping[str, Any]) -> Reward:
    """The reward under a user's name. Raises ConfigError."""
    what, found = f"The reward {name!r}", import_function(name)
    if _is_reward(found):
        if options:
            raise ConfigError(
                f"{what} is a Reward object, which takes no options, got {sorted(options)}. Leave them out, or name a "
                "function that returns the Reward for these options."
            )
        return found
    if is_trl_form(found):
        return one_at_a_time(found, name, options)
    if inspect.isclass(found) or not _has_open_parameters(found, options):
        check_options(what, found, options)
        return as_reward(found(**options), f"{what} has only options as parameters, and its result", name)
    check_options(what, found, options, given=2)
    return FunctionReward(
        name=name,
        function=lambda prompt, text: found(prompt, text, **options),
        needs=columns_of(found),
        undeclared=True,
    )


def _has_open_parameters(function: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    """Whether a function takes positional arguments besides its options: then it is called for each response."""
    for one in inspect.signature(function).parameters.values():
        if one.kind is one.VAR_POSITIONAL:
            return True
        positional = one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        if positional and one.default is one.empty and one.name not in options:
            return True
    return False


def _is_reward(given: Any) -> TypeGuard[Reward]:
    """Whether `given` is a Reward object; a class of Rewards, which has the members too, is not."""
    return isinstance(given, Reward) and not inspect.isclass(given)


def _is_function(given: Any) -> TypeGuard[RewardFn]:
    """Whether `given` can be called with (prompt, text); true for a builtin without a signature."""
    if not callable(given) or inspect.isclass(given):
        return False
    try:
        inspect.signature(given).bind(*range(2))
    except TypeError:
        return False
    except ValueError:  # no signature
        return True
    return True
