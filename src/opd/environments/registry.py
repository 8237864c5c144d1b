"""The environment of a recipe's section, and the rules of its conversations."""

from __future__ import annotations

from opd.environments.acting import Limits
from opd.environments.conversations import Rules
from opd.environments.protocol import Environment
from opd.environments.tools import tools_of
from opd.errors import ConfigError, nearest
from opd.plugins import check_options, checked, import_function, result_of
from opd.recipe.environment import EnvironmentSection

TEXTARENA = "textarena:"


def environment_of(section: EnvironmentSection, where: str) -> Environment:
    """The environment that a section names. Raises ConfigError."""
    if section.name == "tools":
        return tools_of(section.tools, section.options, where, section.error)
    if section.name.startswith(TEXTARENA):
        from opd.environments.textarena_games import game_of

        return game_of(section.name.removeprefix(TEXTARENA), section.options, where)
    if ":" not in section.name:
        raise ConfigError(
            f"{where}: there is no environment {section.name!r}.{nearest(section.name, ['tools'])} Give tools, "
            "textarena:GAME, or a function of yours as my_module:function."
        )
    what = f"{where}: environment {section.name}"
    function = import_function(section.name)
    check_options(what, function, section.options)
    return checked(result_of(what, function, **section.options), Environment, what, "act")


def rules_of(section: EnvironmentSection, where: str) -> Rules:
    """The rules of the conversations with the environment of a section. Raises ConfigError."""
    return Rules(
        environment=environment_of(section, where),
        format=section.format,
        max_turns=section.max_turns,
        max_turn_length=section.max_turn_length,
        keeps_rewritten=section.rewritten == "keep",
        workers=section.workers,
        limits=Limits(timeout_s=section.timeout_s, characters=section.max_characters, error=section.error),
    )
