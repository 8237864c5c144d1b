"""The tokenizer, the endings, the number of positions and the tensors' names of a recipe's model, before it loads."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from opd.models.endings import Endings, endings_of, generation_ids
from opd.models.experts import coefficient_in
from opd.models.positions import positions_of
from opd.models.remembered import keep, recall
from opd.recipe.schema import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from opd.models.gguf_file import GGUFFile
    from opd.models.paths import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a transformers config says; `remembered` keeps it as JSON."""

    rows: float  # of the input and output layers; infinite if it does not say
    positions: float  # `positions_of`
    balance: float  # `experts.coefficient_in`


def tokenizer_of(spec: ModelSpec, name: str, where: str | None = None) -> Any | None:
    """The tokenizer of a folder, a GGUF file or a new model; None if it comes with weights that do not exist yet.

    None also for a GGUF file whose tokenizer `gguf_tokenizer` leaves to transformers, until the file is converted.
    Also None for a user's scorer. For a server it is the one that its section names, else that of the path that the run
    starts a server of, else None. `where` is the name of the path in messages; default: the recipe's key.
    """
    from opd.models.new import new_config, new_tokenizer
    from opd.models.tokenizer_files import load_tokenizer

    label = where or f"models.{name}.path"
    if spec.server is not None and spec.server.start is not None and spec.tokenizer is None:
        spec = ModelSpec(path=spec.server.start.path, chat_template=spec.chat_template)
    if not spec.local and spec.tokenizer is None:
        return None
    if not spec.local:
        tokenizer = new_tokenizer(spec, name)
    elif spec.init is not None:
        tokenizer = new_tokenizer(spec, name)
        new_config(spec, name, tokenizer)
    else:
        source = _source(spec, name, where)
        if source is None:
            tokenizer = _before_conversion(spec, name, label)
        else:
            tokenizer = load_tokenizer(source.tokenizer, trust_remote_code=spec.trust_remote_code, where=label)
        if tokenizer is None:
            return None
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    return tokenizer


def known_positions(spec: ModelSpec, name: str, tokenizer: Any) -> float:
    """The number of positions of a recipe's model; infinite if its config does not say, or cannot be read yet.

    Of a GGUF file that has not been converted, as its header says. Raises ConfigError for one that cannot be read.
    """
    file = _unconverted(spec, name)
    if file is not None:
        from opd.models.gguf_weights import stated_positions

        return stated_positions(file)
    known = known_facts(spec, name, tokenizer)
    return math.inf if known is None else known.positions


def known_rows(spec: ModelSpec, name: str, tokenizer: Any) -> float:
    """The number of rows of the input and output layers of a recipe's model; infinite if its config cannot be read."""
    known = known_facts(spec, name, tokenizer)
    return math.inf if known is None else known.rows


def known_facts(spec: ModelSpec, name: str, tokenizer: Any) -> Facts | None:
    """Facts of a model's config; None if it cannot be read yet. Of a folder seen before they are remembered."""
    source = None if spec.path is None or spec.trust_remote_code else _source(spec, name)
    kept = None if source is None else recall("config", source.weights)
    if kept is not None:
        return Facts(**kept)
    config = known_config(spec, name, tokenizer)
    if config is None:
        return None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    facts = Facts(
        rows=rows if isinstance(rows, int) else math.inf,
        positions=positions_of(config),
        balance=coefficient_in(config),
    )
    if source is not None:
        keep("config", source.weights, asdict(facts))
    return facts


def known_endings(spec: ModelSpec, name: str, tokenizer: Any) -> Endings:
    """What ends the responses of a recipe's model: `endings_of`, with the ids of its generation config if it is there.

    As transformers does, a model without a generation config has the ids of its config.
    """
    from transformers import GenerationConfig

    from opd.models.gguf_tokenizer import end_ids

    file = _unconverted(spec, name)
    if file is not None:
        return endings_of(tokenizer, spec.template_options, generation=end_ids(file), below=math.inf)
    source = None if spec.path is None else _source(spec, name)
    config: Any = None
    if source is not None:
        try:
            config = GenerationConfig.from_pretrained(source.weights)
        except Exception:  # without one; of a damaged one transformers raises any type, and `read_config` reports it
            config = known_config(spec, name, tokenizer)
    rows = known_rows(spec, name, tokenizer)
    return endings_of(tokenizer, spec.template_options, generation=generation_ids(config), below=rows)


def known_config(spec: ModelSpec, name: str, tokenizer: Any) -> Any | None:
    """The transformers config of a recipe's model; None if it cannot be read yet. `tokenizer`: of a new model."""
    if spec.init is not None:
        from opd.models.new import new_config

        return new_config(spec, name, tokenizer)
    source = _source(spec, name)
    if source is None:
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.weights, trust_remote_code=spec.trust_remote_code)
    except Exception:  # of a damaged file transformers raises any type; `known_weights`, or loading it, reports it
        return None


def without_weights(config: Any, *, trust_remote_code: bool) -> nn.Module | None:
    """A model of this config without storage; None if it cannot be built so."""
    import torch

    from opd.models.new import auto_class

    # Any error: a model's own code need not run without storage. Loading the model then reports what is wrong.
    with contextlib.suppress(Exception), torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return None


def known_weights(spec: ModelSpec, name: str) -> list[str]:
    """Notes on a model's weights, which are compared with its config by name and shape. Raises ConfigError."""
    from opd.models.adapter_files import adapter_tensors
    from opd.models.gguf import notes_of
    from opd.models.weights import check_weights

    _unconverted(spec, name)  # names a damaged file
    source = None if spec.path is None else _source(spec, name)
    if source is None:
        return []
    for adapter in source.adapters:
        adapter_tensors(adapter, f"models.{name}.path")  # names a damaged file
    if isinstance(source.weights, str):
        return [f"model {name}: its weights come from the hub and are checked when they load"]
    notes = [f"model {name}: {note}" for note in notes_of(source.weights)]
    return [*notes, *check_weights(source.weights, spec, f"models.{name}.path")]


def _unconverted(spec: ModelSpec, name: str) -> GGUFFile | None:
    """The header of a model's GGUF file that has not been converted; None for every other model.

    Raises ConfigError for a damaged file.
    """
    from opd.models.gguf_file import read_gguf
    from opd.models.paths import source_of

    if spec.path is None or _source(spec, name) is not None:
        return None
    return read_gguf(Path(source_of(spec, name).weights))


def _before_conversion(spec: ModelSpec, name: str, where: str) -> Any | None:
    """The tokenizer that the conversion of a GGUF file will write, or that an adapter of it has."""
    from opd.models.gguf_file import read_gguf
    from opd.models.gguf_tokenizer import read_tokenizer, reads
    from opd.models.paths import source_of
    from opd.models.tokenizer_files import load_tokenizer

    source = source_of(spec, name, where)
    if source.tokenizer != source.weights:
        return load_tokenizer(source.tokenizer, trust_remote_code=spec.trust_remote_code, where=where)
    file = read_gguf(Path(source.weights))
    if not reads(file):
        return None
    with TemporaryDirectory() as folder:  # written and read, as that of a converted file
        read_tokenizer(file)[0].save_pretrained(folder)
        return load_tokenizer(Path(folder), trust_remote_code=False, where=where)


def _source(spec: ModelSpec, name: str, where: str | None = None) -> Source | None:
    """The parts of a model with a path; None for a GGUF file that has not been converted."""
    from opd.models.gguf import cached_gguf
    from opd.models.paths import source_of

    if not spec.local:
        return None
    source = source_of(spec, name, where)
    if not isinstance(source.weights, Path) or source.weights.suffix != ".gguf":
        return source
    folder = cached_gguf(source.weights)
    if folder is None:
        return None
    return replace(source, weights=folder, tokenizer=folder if source.tokenizer == source.weights else source.tokenizer)
