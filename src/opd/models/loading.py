"""From a recipe's model section to a LanguageModel: folders, hub ids, GGUF files, packaged files, new models."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch

from opd.errors import ConfigError, OPDError
from opd.models import adapters, wrapping
from opd.models.gguf import convert_gguf
from opd.models.language_model import LanguageModel
from opd.models.new import new_model
from opd.models.paths import near_path, resolved_path
from opd.recipe.schema import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    spec: ModelSpec, *, name: str, folder: Path | None = None, seed: int = 0, where: str | None = None
) -> LanguageModel:
    """Load the model of a recipe; `folder` replaces its path (a stage's result). Raises ConfigError or DataError.

    The recipe's `seed` and the model's name determine the random weights of new adapters, and of a new model without a
    seed. `where` is the name of the path in messages; default: the recipe's key.
    """
    try:
        model, tokenizer = _load(spec, name, folder, seed, where)
    except OPDError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # adds the place to the libraries' messages
        origin = folder or spec.path or "init"
        raise ConfigError(f"{where or f'models.{name}'}: {origin} could not be loaded as a model: {error}") from error
    return wrapping.wrap(
        model.eval(), tokenizer, name=name, template_options=spec.template_options, autocast=spec.autocast
    )


def _load(spec: ModelSpec, name: str, folder: Path | None, seed: int, where: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    device = torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model: Any
    if spec.init is not None and folder is None:
        model, tokenizer = new_model(spec, name, seed)
    else:
        path = folder or resolve(spec, name, where)
        tokenizer = load_tokenizer(path, spec, name, where)
        attention = {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}
        # Only safetensors: a pickle can run code.
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[spec.dtype],
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            **attention,
        )
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    model = model.to(device=device, dtype=DTYPES[spec.dtype])
    if spec.autocast and device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # the output layer, which autocast leaves in float32, uses TF32
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.lora is not None:
        if spec.gradient_checkpointing:
            model.enable_input_require_grads()
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(f"{seed}-{name}-lora".encode()))  # independent of earlier random numbers
            model = adapters.add_lora(model, **spec.lora.model_dump())
    return model, tokenizer


def load_tokenizer(path: Path | str, spec: ModelSpec, name: str, where: str | None = None) -> Any:
    """The tokenizer of a folder or hub id. Raises ConfigError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if _is_whole(path):
            return PreTrainedTokenizerFast.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        taken = "a folder" if isinstance(path, Path) else "not a local folder and so used as a hub id"
        near = "" if isinstance(path, Path) else near_path(Path(path))
        raise ConfigError(
            f"{where or f'models.{name}.path'}: no tokenizer could be loaded from {path}, which is {taken}."
            f"{near} {error}"
        ) from error


def _is_whole(path: Path | str) -> bool:
    """Whether the tokenizer of a folder is all in its tokenizer.json.

    For some kinds of model, such as qwen2 and phi3, AutoTokenizer of transformers 5.23 makes such a tokenizer into the
    class of that kind, which cuts text in its own way.
    """
    config = Path(path) / "tokenizer_config.json"
    if not (isinstance(path, Path) and config.exists() and (path / "tokenizer.json").exists()):
        return False
    return json.loads(config.read_text()).get("tokenizer_class") == "TokenizersBackend"


def resolve(spec: ModelSpec, name: str, where: str | None = None) -> Path | str:
    """The folder (or hub id) that transformers can load. GGUF files are converted once, into the cache."""
    path = resolved_path(spec, name, where)
    return convert_gguf(path) if isinstance(path, Path) and path.suffix == ".gguf" else path
