"""TODO: opd/rewards/registry.py"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opd.errors import ConfigError, nearest
from opd.pieces.needs import columns_of
from opd.plugins import check_options, import_function
from opd.recipe.schema import Asks
from opd.rewards.base import AnyReward, GroupReward, Reward, RewardFn
from opd.rewards.functions import exact, final_number, math_verify, max_words, reasoning_gym, regex
from opd.rewards.rubric import rubric


def load_reward(name: str, options: Mapping[str, Any]) -> AnyReward:
    """A reward of `REWARDS`, or a user's `package.module:function`, which is called (prompt, response, **options).

    The parameters of a built-in reward's function are its options. `opd.pieces.needs.columns_of(reward)` says which
    data columns it reads. Raises ConfigError for an unknown name or option, or when a package is not installed.
    """
    if ":" in name:
        function = import_function(name)
        check_options(f"The reward {name!r}", function, options, given=2)
        return Reward(
            name=name, function=lambda prompt, text: function(prompt, text, **options), needs=columns_of(function)
        )
    if name not in REWARDS:
        raise ConfigError(
            f"There is no reward {name!r}.{nearest(name, REWARDS)} There are: {', '.join(REWARDS)}, "
            "and your own as `my_package.mine:function`."
        )
    check_options(f"The reward {name!r}", REWARDS[name], options, beside=tuple(Asks.model_fields))
    made = REWARDS[name](**options)
    if isinstance(made, GroupReward):
        return made
    return Reward(name=name, function=made, needs=columns_of(made))


def one_by_one(name: str) -> RewardFn:
    """A reward, with its defaults, that looks at one response at a time. Raises ConfigError for one of whole groups."""
    reward = load_reward(name, {})
    if isinstance(reward, GroupReward):
        raise ConfigError(f"Reward {name!r} grades all responses to a prompt at once. Use one that grades one by one.")
    return reward


REWARDS: dict[str, Callable[..., AnyReward]] = {
    "exact": exact,
    "regex": regex,
    "final_number": final_number,
    "max_words": max_words,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
    "rubric": rubric,
}
