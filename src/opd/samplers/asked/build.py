"""Builds a judge from its section of a recipe, and checks the section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.engines.address import check_address, check_key, key_in
from opd.errors import ConfigError
from opd.models.language_model import LanguageModel
from opd.plugins import check_options, import_function
from opd.recipe.schema import JudgeSection
from opd.samplers.asked.endpoint import Endpoint
from opd.samplers.asked.local import LocalJudge, weights_digest
from opd.samplers.asked.program import Program
from opd.samplers.asked.protocol import Judge


def judge_of(
    section: JudgeSection, models: Mapping[str, LanguageModel], origins: Mapping[str, Mapping[str, Any]]
) -> Judge:
    """The judge of a section that `check_judge` accepts.

    `models` are loaded models by name, `origins` their sections of the recipe. A server's key is read from the
    environment here and stays in memory. Raises ConfigError for a model that is not loaded.
    """
    if section.url is not None and section.model is not None:
        return Endpoint(
            url=section.url,
            model=section.model,
            key=key_in(section.api_key_env),
            body=section.body,
            max_tokens=section.max_tokens,
            retries=section.retries,
            timeout_s=section.timeout_s,
            patience_s=section.patience_s,
            concurrency=section.concurrency,
        )
    if section.lm is not None:
        if section.lm not in models:
            raise ConfigError(
                f"A judge uses the model {section.lm!r}, which is not loaded. A stage loads the models that the "
                f"`reward` of its recipe names{': now ' + ', '.join(models) if models else ''}. Name it there, e.g. "
                f"reward: {{name: ..., judge: {{lm: {section.lm}}}}}."
            )
        lm = models[section.lm]
        origin = {**origins[section.lm], "weights": weights_digest(lm)}
        return LocalJudge(lm=lm, origin=origin, max_tokens=section.max_tokens, retries=section.retries)
    assert section.function is not None, "sections without url, lm or function are refused earlier"
    return Program(
        function=import_function(section.function),
        name=section.function,
        options=section.options,
        retries=section.retries,
    )


def check_judge(section: JudgeSection, where: str) -> None:
    """Raise ConfigError for an invalid address, a missing key, or a function that is missing or cannot be called.

    No message repeats an address or a name that might hold a secret.
    """
    if section.url is not None:
        check_address(section.url, f"{where}: `url`")
    if section.api_key_env is not None:
        check_key(section.api_key_env, where)
    if section.function is not None:
        check_options(
            f"{where}: the function {section.function}", import_function(section.function), section.options, given=1
        )
