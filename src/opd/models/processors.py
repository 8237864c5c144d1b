"""The processor of a model that reads pictures, as a tokenizer: texts with images become ids, and ids become text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.messages import IMAGE
from opd.recipe.schema import ModelSpec
from opd.types import Image, Prompt

FILES = ("processor_config.json", "preprocessor_config.json")
# Special tokens of images in a transformers config.
_OF_IMAGES = re.compile(r"(image|video|audio|vision|boi|eoi)[a-z_]*token[a-z_]*_(id|index)|(boi|eoi)_token_index")


# By processor and vocabulary: the pictures of this process. A model that is loaded again, by a check before it or by a
# later stage, knows those that the ids of a continued run name.
_MADE: dict[str, Any] = {}


class PictureTokenizer:
    """The tokenizer of a processor. It reads texts with images, and takes picture codes where it takes ids.

    All else is the tokenizer's: attributes that are not here are read from it and set on it.
    """

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        from opd.models.pictures import Pictures

        vocabulary = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
        mark = processor.image_token  # of Gemma 3, the token that begins an image; its placeholder is the tokenizer's
        placeholder = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "image_token", None) or mark)
        vars(self).update(
            tokenizer=tokenizer,
            processor=processor,
            pictures=_MADE.setdefault(
                f"{processor.to_json_string()} {vocabulary}",
                Pictures(processor=processor, mark=mark, placeholder=placeholder),
            ),
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "tokenizer" not in vars(self):  # while it is copied it has nothing
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.tokenizer, name, value)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's: texts without images."""
        return self.tokenizer(*args, **kwargs)

    def ids(self, text: str, images: Sequence[Image], where: str, **options: Any) -> list[int]:
        """The ids of a text with a mark for each image: `Pictures.ids`."""
        text = text.replace(IMAGE, self.pictures.mark) if images else text
        if not images and self.pictures.mark not in text:
            return self.tokenizer(text, **options).input_ids
        return self.pictures.ids(text, images, where, **options)

    def plain(self, ids: Any) -> Any:
        """Ids, or one id, with the model's placeholder for picture codes."""
        from opd.models.pictures import is_code

        if isinstance(ids, int):
            return self.pictures.placeholder if is_code(ids) else ids
        return [self.plain(int(i)) for i in ids]

    def decode(self, ids: Any, **options: Any) -> Any:
        """As the tokenizer's."""
        return self.tokenizer.decode(self.plain(ids), **options)

    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> Any:
        """As the tokenizer's."""
        return self.tokenizer.convert_ids_to_tokens(self.plain(ids), **options)

    def save_pretrained(self, folder: Path, **options: Any) -> Any:
        """Write the tokenizer and the processor."""
        return self.processor.save_pretrained(folder, **options)


def sees(tokenizer: Any) -> bool:
    """Whether it reads images."""
    return isinstance(tokenizer, PictureTokenizer)


def refuse_images(prompts: Sequence[Prompt], what: str) -> None:
    """Raise ConfigError for prompts with images, which `what` does not read."""
    if shown := [prompt.id for prompt in prompts if prompt.images]:
        raise ConfigError(
            f"{what} reads text alone in opd, and {len(shown)} of these {len(prompts)} prompts have images (the first "
            f"is prompt {shown[0]}). Use a model in this process, or leave the images out."
        )


def plain(ids: Sequence[int], tokenizer: Any) -> Sequence[int]:
    """The ids that the tokenizer's own vocabulary has: the placeholder for picture codes."""
    return tokenizer.plain(ids) if sees(tokenizer) else ids


def with_processor(tokenizer: Any, path: Path | str, *, trust_remote_code: bool, where: str) -> Any:
    """The tokenizer of a folder or hub id with its processor, if it has one that reads images.

    Raises ConfigError, beginning with `where`, for one that cannot be loaded.
    """
    if not _has_processor(path):
        return tokenizer
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # without torchvision ImportError, AttributeError or another; of a damaged file any
        raise ConfigError(_unloadable(path, where, error)) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "image_token"):
        return tokenizer  # of sound, or AutoProcessor's choice of a plain tokenizer
    return PictureTokenizer(processor.tokenizer, processor)


def new_processor(spec: ModelSpec, name: str, tokenizer: Any) -> PictureTokenizer:
    """The processor of a new LLaVA with a CLIP or SigLIP encoder, for its image size and patches.

    `spec.image_processor` overrides settings such as `image_mean`. Raises ConfigError for another family.
    """
    from transformers import AutoConfig, CLIPImageProcessorPil, LlavaProcessor, SiglipImageProcessorPil

    init: dict[str, Any] = {**(spec.init or {})}
    vision: dict[str, Any] = {"model_type": "clip_vision_model", **init.get("vision_config", {})}
    kind = vision["model_type"]
    if init.get("model_type") != "llava" or kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ConfigError(
            f"models.{name}: opd makes the processor of a new model for `init: {{model_type: llava}}` with a "
            f"vision_config of clip_vision_model or siglip_vision_model; got {init.get('model_type')} with {kind}. "
            "Save another family's processor to a folder, and name it as `tokenizer`."
        )
    sizes = AutoConfig.for_model(**vision)
    side = {"height": sizes.image_size, "width": sizes.image_size}
    clip = kind == "clip_vision_model"
    given = {"size": {"shortest_edge": sizes.image_size}, "crop_size": side} if clip else {"size": side}
    maker: Any = CLIPImageProcessorPil if clip else SiglipImageProcessorPil
    try:
        images = maker(**{**given, **spec.image_processor})
    except Exception as error:  # of settings that do not fit, transformers raises any type
        raise ConfigError(f"models.{name}.image_processor cannot be used: {error}. Correct it.") from error
    whole = init.get("vision_feature_select_strategy", "default") == "full"
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="full" if whole else "default",
        num_additional_image_tokens=1 if clip else 0,
        chat_template=spec.chat_template,
    )
    return PictureTokenizer(tokenizer, processor)


def _has_processor(path: Path | str) -> bool:
    if isinstance(path, Path):
        return any((path / name).is_file() for name in FILES)
    from transformers.utils.hub import cached_file

    return any(
        cached_file(path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False)
        for name in FILES
    )


def _unloadable(path: Path | str, where: str, error: Exception) -> str:
    why = " ".join(str(error).split())
    missing = [name for name in ("torchvision", "PIL") if not _installed(name)]
    remedy = "Correct its files, or remove them to use the model for text alone."
    if "PIL" in missing:
        remedy = "Install pillow: pip install 'opd[vision]'."
    elif missing:
        remedy = (
            "Processors of this family need torchvision: install the release that fits the installed torch, or remove "
            "the processor's files to use the model for text alone."
        )
    return f"{where}: the processor in {path} cannot be loaded: {type(error).__name__}: {why:.300}. {remedy}"


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def image_tokens(tokenizer: Any, config: Any) -> frozenset[int]:
    """The ids that stand for or around images in a model that reads them: they are never written.

    Empty for a model without a processor. Raises ConfigError if processor and model have other placeholders.
    """
    if not sees(tokenizer):
        return frozenset()
    own = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    placeholder = tokenizer.pictures.placeholder
    if own is not None and own != placeholder:
        raise ConfigError(
            f"The processor writes the placeholder {tokenizer.decode([placeholder])!r} (id {placeholder}) for images, "
            f"and the model's config has the id {own}. Correct `image_token_id` in one of them."
        )
    found = {value for name, value in config.to_dict().items() if _OF_IMAGES.fullmatch(name)}
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    around = {*tokenizer.plain(noise_picture(tokenizer, 0).ids)} & added
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return frozenset(i for i in {*found, *around, placeholder} - ends if isinstance(i, int) and i >= 0)


def noise_picture(tokenizer: Any, seed: int) -> Any:
    """A picture of 64 x 64 pixels of noise, as the processor makes it."""
    import numpy as np
    from PIL import Image as Pillow

    from opd.files import encoded_image

    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return tokenizer.pictures.picture(encoded_image(Pillow.fromarray(noise), f"noise {seed}"), "A picture of noise")
