"""Pictures in prompts: a picture's placeholders are ids that name the picture, and the tensors that a forward gets.

Everything between a prompt and a forward holds lists of token ids: samplers, shared prefixes, caches, batches, files.
A model's placeholder is one id, whatever the picture, so two prompts of equal words would have equal ids. Here each
placeholder of a picture is a *picture code*:

    bit 62        set: no token of a vocabulary
    bits 14 - 61  the first 48 bits of the SHA-256 of the picture's tensors, as the processor made them
    bits 0 - 13   the place in the picture, from 0

So ids are equal exactly where words and pixels are. Only `LanguageModel.forward` puts the placeholder back (`inputs`),
and there each different picture is encoded once, with gradient.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opd.errors import ConfigError, DataError
from opd.files import opened_image
from opd.types import Image

MARK = 1 << 62
PLACES = 14  # bits
MOST = 1 << PLACES  # placeholders of a picture
LIMIT = 1 << 30  # bytes of tensors that are kept; those of other pictures are made again from the image
TEXTS = 1 << 14  # whose ids are kept
# What a processor returns besides a picture's tensors. PaliGemma's returns labels unasked.
WORDS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
FEATURES = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")  # of an encoder's result


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture as a processor made it."""

    digest: str  # SHA-256 of its tensors, hexadecimal
    tokens: int  # placeholders
    values: int  # of its pixels, all crops together
    ids: tuple[int, ...]  # a prompt of this picture alone: codes, and what the processor writes around them
    image: Image
    where: str  # of the prompt that held it first, for messages

    @property
    def code(self) -> int:
        """The code of its first placeholder."""
        return MARK | int(self.digest[:12], 16) << PLACES

    @property
    def codes(self) -> range:
        """The codes of its placeholders, in order."""
        return range(self.code, self.code + self.tokens)


@dataclass(slots=True, kw_only=True)
class Pictures:
    """The pictures that a processor has made so far: by their image, and by code with their tensors."""

    processor: Any  # of transformers: a tokenizer and an image processor
    mark: str  # what stands for a picture in a text, before the processor
    placeholder: int  # the id of a picture's tokens in the model
    limit: int = LIMIT
    known: dict[str, Picture] = field(default_factory=dict[str, Picture])  # by the image's digest
    by_code: dict[int, Picture] = field(default_factory=dict[int, Picture])
    kept: OrderedDict[str, dict[str, Tensor]] = field(default_factory=OrderedDict[str, dict[str, Tensor]])
    held: int = 0  # bytes of `kept`
    # The ids of texts with placeholders: pictures of equal sizes give a text equal ones.
    texts: dict[Any, list[int]] = field(default_factory=dict[Any, list[int]])

    def picture(self, image: Image, where: str) -> Picture:
        """The picture of an image. Raises DataError, beginning with `where`, for a file that is no image.

        Also for an image of which the processor makes no placeholder or too many.
        """
        if (found := self.known.get(image.digest)) is not None:
            return found
        words, tensors = self._made(image, where)
        digest = digest_of(tensors)
        tokens = words.count(self.placeholder)
        if not 0 < tokens <= MOST:
            raise DataError(
                f"{where}: the processor makes {tokens} placeholders of the image {image.name}, and opd reads 1 to "
                f"{MOST}. Give a smaller image, or set a smaller size in the processor."
            )
        code = MARK | int(digest[:12], 16) << PLACES
        places = iter(range(code, code + tokens))
        ids = tuple(next(places) if i == self.placeholder else i for i in words)
        values = tensors["pixel_values"].numel()
        made = Picture(digest=digest, tokens=tokens, values=values, ids=ids, image=image, where=where)
        if (other := self.by_code.setdefault(code, made)).digest != digest:
            raise DataError(
                f"{where}: the images {image.name} and {other.image.name} ({other.where}) have the same first 48 bits "
                "of their SHA-256, so opd could not tell them apart. Change a pixel of one of them."
            )
        self.known[image.digest] = made
        self._keep(digest, tensors)
        return made

    def tensors(self, picture: Picture) -> dict[str, Tensor]:
        """The tensors that the model's encoder reads, made again if they are not kept.

        Raises DataError for an image whose file has changed.
        """
        if (found := self.kept.get(picture.digest)) is not None:
            self.kept.move_to_end(picture.digest)
            return found
        _, tensors = self._made(picture.image, picture.where)
        if digest_of(tensors) != picture.digest:
            raise DataError(
                f"{picture.where}: the image {picture.image.name} has changed since the run began. Put it back."
            )
        self._keep(picture.digest, tensors)
        return tensors

    def _made(self, image: Image, where: str) -> tuple[list[int], dict[str, Tensor]]:
        """(the ids of a prompt of this image alone, the picture's tensors)."""
        opened = opened_image(image, where)
        made = self.processor(text=[self.mark], images=[[opened]], return_tensors="pt", add_special_tokens=False)
        tensors = {name: made[name] for name in sorted(made) if name not in WORDS}
        return made["input_ids"][0].tolist(), tensors

    def _text(self, text: str, pictures: Sequence[Picture], where: str, options: Mapping[str, Any]) -> list[int]:
        """The ids of a text, with placeholders."""
        sizes = tuple(tuple(min(i, MARK) for i in picture.ids) for picture in pictures)
        key = (text, sizes, tuple(options.items()))
        if key not in self.texts:
            if len(self.texts) >= TEXTS:
                self.texts.clear()
            opened = [[opened_image(picture.image, where) for picture in pictures]]
            self.texts[key] = self.processor(text=[text], images=opened, **options)["input_ids"][0]
        return self.texts[key]

    def _keep(self, digest: str, tensors: dict[str, Tensor]) -> None:
        self.held += 0 if digest in self.kept else _bytes(tensors)
        self.kept[digest] = tensors
        while self.held > self.limit and len(self.kept) > 1:
            self.held -= _bytes(self.kept.popitem(last=False)[1])

    def ids(self, text: str, images: Sequence[Image], where: str, **options: Any) -> list[int]:
        """The ids of a text with a mark for each image, in order. [prompt tokens]

        Raises DataError, beginning with `where`, if marks and images differ in number, and if the processor makes
        another number of placeholders of them together than of each alone.
        """
        marks = text.count(self.mark)
        if marks != len(images):
            raise DataError(
                f"{where} has {len(images)} images, and its text has {marks} marks {self.mark!r} for them. Give each "
                "image one mark: a part {'type': 'image'} of a message, or the mark in the text."
            )
        pictures = [self.picture(image, f"{where}, image {i}") for i, image in enumerate(images)]
        ids = self._text(text, pictures, where, options)
        expected = sum(picture.tokens for picture in pictures)
        if ids.count(self.placeholder) != expected:
            raise DataError(
                f"{where}: the processor makes {ids.count(self.placeholder)} placeholders of the images "
                f"{', '.join(image.name for image in images)}, and {expected} of each alone. Use one image for each "
                "prompt, or a processor that reads each image by itself."
            )
        codes = (code for picture in pictures for code in picture.codes)
        return [next(codes) if i == self.placeholder else i for i in ids]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors with their names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def is_code(token: int) -> bool:
    """Whether an id is a picture code."""
    return token >= MARK


def codes_of(ids: Sequence[int]) -> set[int]:
    """The codes of the whole pictures in some ids, each that of its first placeholder."""
    return {i for i in ids if i >= MARK and not i & (MOST - 1)}


def cut_before_picture(ids: Sequence[int], end: int) -> int:
    """The largest place, at most `end`, at which `ids` can be cut outside of a picture."""
    while 0 < end < len(ids) and is_code(ids[end]) and ids[end] & (MOST - 1):
        end -= 1
    return end


def inputs(pictures: Pictures, backbone: nn.Module, ids: Tensor, name: str) -> tuple[Tensor, dict[str, Any]]:
    """(the ids [b, L] with the model's placeholder, what else its `backbone` gets): the pictures, encoded once each.

    `name` is the model's, for messages. Raises DataError for a picture that is not whole or not known.
    """
    marked = ids >= MARK
    if not bool(marked.any()):
        return ids, {}
    parameters = inspect.signature(backbone.forward).parameters
    if "mm_encoder_outputs" not in parameters:
        raise ConfigError(
            f"{name}: {type(backbone).__name__} of this transformers takes no `mm_encoder_outputs`, with which opd "
            "gives a model its pictures. Install transformers 5.23 or later."
        )
    shown = in_order(pictures, ids[marked].tolist(), marked.nonzero()[:, 0].tolist())
    # Families whose images attend both ways, such as Gemma 3, read here which tokens are images.
    kinds = {kind: marked.long() for kind in ("token_type_ids", "mm_token_type_ids") if kind in parameters}
    encoded = features(pictures, backbone, shown, ids.device, name)
    return torch.where(marked, pictures.placeholder, ids), {"mm_encoder_outputs": {"image": encoded}, **kinds}


def in_order(pictures: Pictures, codes: Sequence[int], rows: Sequence[int]) -> list[Picture]:
    """The pictures of a batch's codes, row by row. Raises DataError for one that is not whole or not known."""
    shown: list[Picture] = []
    at = 0
    while at < len(codes):
        first = codes[at] & ~(MOST - 1)
        picture = pictures.by_code.get(first)
        if picture is None:
            raise DataError(
                "A prompt holds the code of a picture that this process has not read. Ids of prompts with pictures are "
                "valid in the run that rendered them: render the prompt again."
            )
        end = at + picture.tokens
        if list(codes[at:end]) != list(picture.codes) or len(set(rows[at:end])) > 1:
            raise DataError(
                f"{picture.where}: a forward would read a part of the image {picture.image.name}, and a picture is "
                "read whole. Please report this."
            )
        shown.append(picture)
        at = end
    return shown


def features(pictures: Pictures, backbone: nn.Module, shown: Sequence[Picture], device: torch.device, name: str) -> Any:
    """What the model's encoder gives for the pictures in this order; each different picture is encoded once."""
    different = {picture.digest: picture for picture in shown}
    dtype = next(backbone.parameters()).dtype
    groups: dict[Any, list[tuple[str, dict[str, Tensor]]]] = {}
    for digest, picture in different.items():
        tensors = pictures.tensors(picture)
        shapes = tuple((name, tuple(one.shape)) for name, one in tensors.items())
        groups.setdefault(shapes, []).append((digest, tensors))
    encode: Any = backbone.get_image_features
    read = inspect.signature(encode).parameters
    encoded: dict[str, Tensor] = {}
    out: Any = None
    for group in groups.values():
        joined = {
            key: torch.cat([_placed(tensors[key], device, dtype) for _, tensors in group])
            for key in group[0][1]
            if key in read
        }
        out = encode(**joined, return_dict=True)
        if others := [key for key in out if key not in FEATURES and out[key] is not None]:
            raise ConfigError(
                f"{name}: the encoder of {type(backbone).__name__} gives `{others[0]}` for every picture, which opd "
                "does not pass on. Please report the architecture."
            )
        counts = [different[digest].tokens for digest, _ in group]
        for (digest, _), own in zip(group, _split(out.pooler_output, counts, name), strict=True):
            encoded[digest] = own
    in_turn = [encoded[picture.digest] for picture in shown]
    # A family whose encoder gives a list concatenates it; one that gives a tensor reads it as it is.
    listed = isinstance(out.pooler_output, (list, tuple))
    return type(out)(pooler_output=in_turn if listed else torch.cat(in_turn)[None])


def _split(made: Any, counts: Sequence[int], name: str) -> Iterable[Tensor]:
    """The features [tokens, H] of each picture. Raises ConfigError if their number is not that of the placeholders."""
    flat = torch.cat([one.reshape(-1, one.shape[-1]) for one in made])
    if len(flat) != sum(counts):
        raise ConfigError(
            f"{name}: its encoder gives {len(flat) / len(counts):g} features for a picture, and its processor writes "
            f"{sum(counts) / len(counts):g} placeholders. Model and processor do not fit together: use the model's own "
            "processor, or correct its settings (patch_size, num_additional_image_tokens, ...)."
        )
    return flat.split(list(counts))


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors.values())
