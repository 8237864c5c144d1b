"""`opd check --live`: contact the servers of a recipe. Loads no weights, trains nothing, changes no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.engines.address import check_private
from opd.errors import ConfigError, DataError
from opd.files import expanded
from opd.models.preview import tokenizer_of
from opd.models.render import render
from opd.recipe.schema import EngineSection, Recipe, StageSpec, origin_of
from opd.runs.lengths import length_checks
from opd.runs.served import able_lines, reached, replicas_of, requests_of

if TYPE_CHECKING:
    from opd.runs.prepare import Prepared


def live_lines(recipe: Recipe, spec: StageSpec, prepared: Prepared) -> Iterator[str]:
    """What the servers of a stage's teachers and of its engine say and can do.

    Raises ConfigError for a server that does not answer or lacks something, DataError for rows longer than it reads.
    """
    names: list[str] = []
    for name in spec.scoring:
        server = recipe.models[name].server
        if server is not None and server.start is not None:
            yield f"{name}: the run starts its server"
        elif server is not None:
            names.append(name)
    engine = spec.engine
    if engine is not None and engine.start is not None:
        engine = None
        yield "engine: the run starts its server"
    if not names and engine is None:
        return
    origin = origin_of(recipe, spec.train)
    tokenizer = tokenizer_of(origin, spec.train)
    if tokenizer is None:
        raise ConfigError(
            f"{spec.where(None)}: --live compares the servers' tokens with the student's, and the tokenizer of "
            f"{spec.train} comes with weights that do not exist yet. Run the stage before it first."
        )
    lengths = [len(render(prompt, tokenizer, origin.template_options)) for prompt in prepared.all_prompts]
    for name in names:
        yield from _teacher(recipe, spec, prepared, name, tokenizer, lengths)
    if engine is not None:
        yield from _engine(recipe, spec, prepared, engine, tokenizer, lengths)


def _teacher(
    recipe: Recipe, spec: StageSpec, prepared: Prepared, name: str, tokenizer: Any, lengths: list[int]
) -> Iterator[str]:
    from opd.engines.capabilities import apart_at_once

    server, method = recipe.models[name].server, prepared.method
    assert server is not None
    replicas, able = reached(server, tokenizer, requests_of(method))
    yield from able_lines(name, replicas, able, method.support.student_top_k)
    if method.support.student_top_k and able.positions:
        yield f"{name}: given tokens are scored by position"
    apart = apart_at_once(replicas, able, len(tokenizer))
    yield f"{name}: one row scored many times at once: log-probs within {apart:.1e} nats"
    if able.longest is not None:
        yield f"{name}: {_room(spec, prepared, name, lengths, able.longest - 1)}"


def _engine(
    recipe: Recipe, spec: StageSpec, prepared: Prepared, section: EngineSection, tokenizer: Any, lengths: list[int]
) -> Iterator[str]:
    from opd.engines.capabilities import probe
    from opd.engines.control import check_adapters, check_control, check_transfer

    if not section.public:
        for url in section.urls:
            check_private(url, f"{spec.where(None)}: `engine`")
    replicas = replicas_of(section)
    able = probe(replicas, section.model, tokenizer, by_position=0, top=lambda _: 0, one_model=False)
    if section.weights == "transfer":
        for url, workers in check_transfer(replicas, able.model, len(tokenizer)).items():
            yield f"engine {url}: {able.model}, workers: {workers}; its log-probs are those of its draws"
        yield "engine: weights go by NCCL, which is not tried here"
        yield from _of_rows(spec, prepared, able.longest, lengths)
        return
    if section.weights == "lora":
        check_adapters(replicas, able.model, len(tokenizer))
        number = len(section.urls)
        yield f"engine: {number} of {able.model}, which take adapters; their log-probs are those of their draws"
        yield from _of_rows(spec, prepared, able.longest, lengths)
        return
    folder = recipe.folder if section.folder is None else expanded(section.folder)
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
    for url, about in check_control(replicas, able.model, len(tokenizer), str(there)).items():
        loaded = f"{about.tensors} tensors of version {about.version}" if about.tensors else "its first weights"
        yield f"engine {url}: {able.model} with {loaded}; its log-probs are those of its draws"
    yield f"engine: weights go through {_shown(folder, there)}, which its servers see"
    yield from _of_rows(spec, prepared, able.longest, lengths)


def _of_rows(spec: StageSpec, prepared: Prepared, longest: int | None, lengths: list[int]) -> Iterator[str]:
    if longest is not None:
        yield f"engine: {_room(spec, prepared, spec.train, lengths, longest)}"


def _shown(folder: Path, there: Path) -> str:
    return str(folder) if folder.absolute() == there else f"{folder} (of which {there} exists)"


def _room(spec: StageSpec, prepared: Prepared, name: str, lengths: list[int], longest: int) -> str:
    """A line on the longest row that a server gets and may get. Raises DataError for one that is too long."""
    rows = [
        (max(check.lengths) + check.tokens, check)
        for check in length_checks(spec, prepared, lengths)
        if check.model == name and check.key == "sampling.max_completion_length"
    ]
    if not rows:  # the teacher reads something else than the prompt
        return f"rows of up to {longest} tokens"
    most, check = max(rows, key=lambda row: row[0])
    if most > longest:
        raise DataError(
            f"{check.where}: {name} gets rows of up to {most} tokens, prompt and response, and its servers read "
            f"{longest}. Start them with a larger --max-model-len, or lower {check.key}."
        )
    return f"rows of up to {most} tokens, of {longest} that its servers read"
