"""From a recipe's model section to a LanguageModel: folders, hub ids, GGUF files, packaged files, new models."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd.errors import ConfigError, OPDError, nearest
from opd.models import language_model
from opd.models.language_model import LanguageModel
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
    return language_model.wrap(
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
            model = language_model.add_lora(model, **spec.lora.model_dump())
    return model, tokenizer


def load_tokenizer(path: Path | str, spec: ModelSpec, name: str, where: str | None = None) -> Any:
    """The tokenizer of a folder or hub id. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        taken = "a folder" if isinstance(path, Path) else "not a local folder and so used as a hub id"
        near = "" if isinstance(path, Path) else near_path(Path(path))
        raise ConfigError(
            f"{where or f'models.{name}.path'}: no tokenizer could be loaded from {path}, which is {taken}."
            f"{near} {error}"
        ) from error


def resolve(spec: ModelSpec, name: str, where: str | None = None) -> Path | str:
    """The folder (or hub id) that transformers can load. GGUF files are converted once, into the cache."""
    path = resolved_path(spec, name, where)
    return convert_gguf(path) if isinstance(path, Path) and path.suffix == ".gguf" else path


def cache_dir() -> Path:
    return Path(os.environ.get("OPD_CACHE", Path.home() / ".cache" / "opd"))


def cached_gguf(file: Path) -> Path:
    """The folder for the conversion of a GGUF file, which may not exist yet."""
    key = hashlib.sha256(f"{file.name}-{file.stat().st_size}".encode()).hexdigest()[:12]
    return cache_dir() / f"{file.stem}-{key}"


def convert_gguf(file: Path) -> Path:
    """A safetensors folder with the file's de-quantised weights (float32), written once into the cache.

    A model that transformers loads from GGUF keeps a quantizer, which prevents `save_pretrained` and training. So its
    weights are copied into a new model without quantization in its config.
    """
    target = cached_gguf(file)
    if (target / "config.json").exists():
        return target
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(f"{file.name} is a GGUF file; reading it needs `pip install 'opd[gguf]'`.") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.to_empty(device="cpu").load_state_dict(loaded.state_dict())
    clean.tie_weights()
    # Remove the name of the file's origin: nothing can be loaded from it.
    clean.config._name_or_path = str(target)
    clean.generation_config = loaded.generation_config
    partial = target.with_name(f"{target.name}.writing-{os.getpid()}")
    clean.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(partial)
    else:
        partial.rename(target)
    return target


def new_model(spec: ModelSpec, name: str, seed: int) -> tuple[Any, Any]:
    """A randomly initialised model from `init` (a transformers config, with `model_type`) and `tokenizer`.

    The tokenizer is {characters: "..."}, one token per character, or a path.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = new_tokenizer(spec, name)
    config = new_config(spec, name, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{seed}-{name}".encode()) if spec.seed is None else spec.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


def new_config(spec: ModelSpec, name: str, tokenizer: Any) -> Any:
    """The transformers config of a new model. Raises ConfigError for an unknown type or key."""
    from transformers import CONFIG_MAPPING, AutoConfig

    settings = dict(spec.init or {})
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        known = nearest(str(model_type), CONFIG_MAPPING.keys())
        raise ConfigError(f"models.{name}.init needs `model_type`, e.g. llama; got {model_type!r}.{known}")
    default = AutoConfig.for_model(model_type)
    for key in settings:
        if not hasattr(default, key):
            raise ConfigError(
                f"models.{name}.init: a {model_type} config has no {key!r}.{nearest(key, default.to_dict())}"
            )
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **ids, **settings})


def new_tokenizer(spec: ModelSpec, name: str) -> Any:
    """The tokenizer of a new model. Raises ConfigError if the recipe names none."""
    from transformers import AutoTokenizer

    if spec.tokenizer is None:
        raise ConfigError(f"models.{name}: a new model needs `tokenizer: {{characters: ...}}` or a tokenizer's path.")
    if isinstance(spec.tokenizer, str):
        return AutoTokenizer.from_pretrained(spec.tokenizer)
    return character_tokenizer(spec.tokenizer.characters, spec.tokenizer.merges)


def character_tokenizer(characters: str, merges: Sequence[tuple[str, str]] = ()) -> Any:
    """<pad> (0), <eos> (1), then one token per character and one per merge of `merges` (byte-pair encoding).

    Raises ConfigError for a merge of unknown tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *dict.fromkeys(characters)])}
    for left, right in merges:
        if missing := [part for part in (left, right) if part not in vocabulary]:
            raise ConfigError(
                f"The tokenizer's merge {left!r} + {right!r} joins {missing[0]!r}, which is neither a character nor "
                "the result of an earlier merge. Correct the order of `merges`, or add the characters."
            )
        vocabulary.setdefault(left + right, len(vocabulary))
    if merges:
        return PreTrainedTokenizerFast(
            tokenizer_object=_pairs(vocabulary, merges), pad_token="<pad>", eos_token="<eos>"
        )
    core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def _pairs(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """Byte-pair encoding of characters. As without merges, an unknown character becomes padding."""
    from tokenizers import Tokenizer, decoders
    from tokenizers import models as token_models

    core = Tokenizer(token_models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<pad>"))
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    return core
