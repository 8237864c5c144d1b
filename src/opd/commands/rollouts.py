"""`opd rollouts MODEL`: a model's responses to prompts, as a file of records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from opd import __version__
from opd.data.prompts import load_selected
from opd.data.records import ROWS, response_batch, response_schema, target_of, write_records
from opd.errors import ConfigError
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.models.paths import resolved_path
from opd.models.processors import refuse_images
from opd.models.render import render_checked
from opd.models.vocabularies import digest_of
from opd.recipe.load import parse_section
from opd.recipe.schema import DataSection, ModelSpec, SamplingSection
from opd.samplers.hf import TransformersSampler
from opd.types import Prompt, Record, ReservedStep, Rollout, Sampling

WHERE = "opd rollouts MODEL"


def write_rollouts(
    model: str,
    *,
    data: Mapping[str, Any],
    sampling: Mapping[str, Any],
    out: str,
    top_k: int = 0,
    seed: int = 0,
    say: Callable[[str], None],
) -> str:
    """Write the responses of the model at path `model` to `out`, and return a line about them.

    `data` and `sampling` are sections of a recipe. `top_k` of the model's most likely tokens are recorded at each
    position. A response depends on (seed, prompt id, sample) alone. `say` receives notes about data and model.

    Raises the errors of `opd.errors`: before sampling for a prompt that leaves no room for a response.
    """
    section = parse_section(SamplingSection, sampling, "sampling")
    settings = Sampling(**{**section.model_dump(), "stop": tuple(section.stop)})
    file = target_of(out, "--out")
    prompts, reports = load_selected(parse_section(DataSection, data, "data"))
    refuse_images(prompts, "A file of records")
    spec = ModelSpec(path=model)
    resolved_path(spec, "model", WHERE)
    lm = load_model(spec, name="model", where=WHERE)
    for note in (*map(str, reports), *lm.notes):
        say(note)
    _check_fits(lm, prompts, settings, top_k)
    schema = response_schema(
        {
            "library": f"opd {__version__}",
            "models": {"student": model},
            "tokens": {"vocabulary": lm.vocabulary, "sha256": digest_of(lm.tokenizer)},
            "data": data["path"],
            "seed": seed,
            "sampling": asdict(settings),
        }
    )
    counts = {"responses": 0, "tokens": 0, "cut": 0}
    total = len(prompts) * settings.n

    def batches() -> Iterator[Any]:
        for rollouts in _written(lm, prompts, settings, top_k, seed):
            counts["responses"] += len(rollouts)
            counts["tokens"] += sum(len(one.response_ids) for one in rollouts)
            counts["cut"] += sum(not one.finished for one in rollouts)
            yield response_batch(rollouts, schema)
            if counts["responses"] < total:
                say(f"{counts['responses']:,} of {total:,} responses")

    write_records(file, schema, batches())
    return (
        f"{out}: {total:,} responses to {len(prompts):,} prompts, {counts['tokens']:,} tokens; "
        f"{counts['cut']:,} responses without an end"
    )


def _check_fits(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling, top_k: int) -> None:
    """Raise ConfigError or DataError for what would stop the sampling later."""
    if not 0 <= top_k <= lm.vocabulary:
        raise ConfigError(
            f"opd rollouts got --top-k {top_k}, and the model has {lm.vocabulary} tokens. Give a number from 0 to that."
        )
    rendered = render_checked(prompts, lm.tokenizer, max_prompt_length=None, template_options=lm.template_options)
    lm.check_ids(rendered)
    longest = max(map(len, rendered)) + sampling.max_completion_length
    lm.check_length(longest, "Lower --max-completion-length, or leave out the longest prompts.")


def _written(
    lm: LanguageModel, prompts: list[Prompt], sampling: Sampling, top_k: int, seed: int
) -> Iterator[list[Rollout]]:
    """The responses, about ROWS at a time: memory does not grow with the data."""
    sampler = TransformersSampler(lm=lm, sampling=sampling, limited_by="--max-completion-length")
    together = max(1, ROWS // sampling.n)
    for first in range(0, len(prompts), together):
        some = prompts[first : first + together]
        yield sampler(some, seed=(seed, ReservedStep.RECORDS), record=Record(top_k=top_k))
