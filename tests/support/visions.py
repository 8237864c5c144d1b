"""Tiny models that read images, one a family, with their processors; and pictures of one colour."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow

from opd.files import encoded_image
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec
from opd.types import Image

CHARACTERS = "abcdefgh0123456789(,) "
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}({% endif %}"
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.4,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
LLAVA = {"vision_feature_layer": -1, "projector_hidden_act": "gelu"}


def tokenizer(*special: str, **named: str) -> Any:
    """One token a character, after <pad>, <eos> and the `special` ones."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", *special, *CHARACTERS, "\n"]
    core = Tokenizer(token_models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.add_special_tokens(list(special))
    extra = {"extra_special_tokens": named} if named else {}
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", **extra)
    mark = named.get("boi_token", special[0])
    made.chat_template = TEMPLATE.replace("MARK", mark)
    return made


def _size(side: int = 32) -> dict[str, int]:
    return {"height": side, "width": side}


def _clip_images() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_size())


def _llava(**changes: Any) -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    text = tokenizer("<image>")
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": len(text), **TEXT, **changes},
        vision_config=CLIP,
        image_token_index=text.convert_tokens_to_ids("<image>"),
        **LLAVA,
    )
    processor = LlavaProcessor(
        _clip_images(), text, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_siglip() -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessorPil

    text = tokenizer("<image>")
    config = LlavaConfig(
        text_config={"model_type": "qwen3", "vocab_size": len(text), "head_dim": 8, **TEXT},
        vision_config=SIGLIP,
        image_token_index=text.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        **LLAVA,
    )
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size=_size()), text, patch_size=8, vision_feature_select_strategy="full"
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    text = tokenizer("<image>")
    points = [[32, 64], [64, 32]]
    config = LlavaNextConfig(
        text_config={"model_type": "llama", "vocab_size": len(text), **TEXT},
        vision_config=CLIP,
        image_token_index=text.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=points,
        **LLAVA,
    )
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=_size(), image_grid_pinpoints=points)
    processor = LlavaNextProcessor(
        images, text, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaNextForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessorPil, Gemma3Processor

    names = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    text = tokenizer(*names.values(), **names)
    ids = {name: text.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Gemma3Config(
        text_config={
            **TEXT,
            "vocab_size": len(text),
            "head_dim": 8,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=_size()), text, image_seq_length=4)
    return Gemma3ForConditionalGeneration(config), processor


def _idefics2() -> tuple[Any, Any]:
    from transformers import (
        Idefics2Config,
        Idefics2ForConditionalGeneration,
        Idefics2ImageProcessorPil,
        Idefics2Processor,
    )

    text = tokenizer(
        "<image>",
        "<fake_token_around_image>",
        "<end_of_utterance>",
        image_token="<image>",
        image_boundary_token="<fake_token_around_image>",
    )
    config = Idefics2Config(
        text_config={"model_type": "mistral", "vocab_size": len(text), "sliding_window": None, **TEXT},
        vision_config={k: v for k, v in CLIP.items() if k != "model_type"},
        perceiver_config={
            "hidden_size": 16,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=text.convert_tokens_to_ids("<image>"),
    )
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}, do_image_splitting=False)
    return Idefics2ForConditionalGeneration(config), Idefics2Processor(images, text, image_seq_len=4)


def _mistral3() -> tuple[Any, Any]:
    from transformers import LlavaProcessor, Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessorPil

    text = tokenizer("<image>")
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(text), "sliding_window": None, "head_dim": 8, **TEXT},
        vision_config={**CLIP, "model_type": "pixtral", "head_dim": 8, "num_channels": 3},
        image_token_index=text.convert_tokens_to_ids("<image>"),
        spatial_merge_size=1,
        vision_feature_layer=-1,
    )
    images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return Mistral3ForConditionalGeneration(config), LlavaProcessor(images, text, patch_size=8)


FAMILIES = {
    "llava": _llava,
    "llava_siglip": _llava_siglip,
    "llava_next": _llava_next,
    "gemma3": _gemma3,
    "idefics2": _idefics2,
    "mistral3": _mistral3,
}


def vision_folder(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A folder with a tiny model of random weights and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = FAMILIES[family](**changes)
        for parameter in model.parameters():
            if parameter.dim() > 1 or bool((parameter == 0).all()):  # projectors of zeros would hide the pictures
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def vision(family: str, folder: Path, seed: int = 0, **changes: Any) -> LanguageModel:
    """The model of `vision_folder`, loaded as a recipe loads it."""
    return load_model(ModelSpec(path=str(vision_folder(family, folder, seed, **changes))), name=family)


def noise(seed: int, side: tuple[int, int] = (32, 32)) -> Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)
    return encoded_image(Pillow.fromarray(pixels), f"noise {seed}")


def colour(red: int, green: int, blue: int) -> Image:
    """An image of one colour."""
    return encoded_image(Pillow.new("RGB", (32, 32), (red, green, blue)), f"colour {red},{green},{blue}")


def opened(image: Image) -> Any:
    """The image for a processor of transformers."""
    return Pillow.open(io.BytesIO(image.content or b"")).convert("RGB")
