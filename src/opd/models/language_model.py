"""Causal language models with their tokenizers: output layer, forward, adapters, saving."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError, DataError
from opd.models.endings import Endings, endings_of
from opd.models.positions import check_positions, positions_of
from opd.models.processors import plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from opd.models.head import Head
else:
    from opd.plugins import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The ways of reading that give a row the states that it has alone. Measured by `probe.probe`.

    `together`: rows of several lengths in one forward, their ends padded. `cache`: token by token. `padding`: token by
    token, rows of several lengths, their beginnings padded. `continues`: several tokens after a cache. `positions`:
    with position ids after a cache, also where no row is padded; else without. `training`: in train() as in eval().
    `recurrent`: the cache holds a state that each token overwrites, so no gradient flows through it.
    """

    together: bool = True
    cache: bool = True
    padding: bool = True
    continues: bool = True
    positions: bool = True
    training: bool = True
    recurrent: bool = False

    @property
    def shares(self) -> bool:
        """Whether a prefix may be read once for several rows, with gradient."""
        return self.together and self.cache and self.padding and self.continues and not self.recurrent


EXACT = Reading()
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A model and its tokenizer, with the properties that scoring and sampling need."""

    model: nn.Module  # a transformers causal LM, or one wrapped by peft
    tokenizer: Any
    vocabulary: int  # V: the ids below it are sampled, scored and trained; at most the largest real id plus one
    stop_ids: frozenset[int]
    template_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    autocast: bool = False  # compute in bfloat16, whatever the weights' dtype
    reading: Reading = EXACT
    name: str = "model"
    unwritten: frozenset[int] = frozenset()  # tokens of images, which are never sampled and have no mass in a loss
    notes: tuple[str, ...] = ()  # for the user, about its weights and tokens

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model; with peft, the wrapped model with its adapter layers."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]

    @property
    def adapters(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    @property
    def endings(self) -> Endings:
        """What ends its responses. `turn` is a token that it has: one of `vocabulary`."""
        return endings_of(self.tokenizer, self.template_options, generation=self.stop_ids, below=self.vocabulary)

    def head(self) -> Head:
        """The output layer, with the multiplier and soft cap of the model's config."""
        from opd.models.head import Head

        layer = self.causal_lm.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(getattr(layer, "weight", None), torch.Tensor) or hasattr(layer, "lora_A"):
            raise ConfigError(
                f"{self.name}: the output layer is a {type(layer).__name__}, but opd needs one weight matrix. "
                "Leave the output layer out of the LoRA target modules."
            )
        multiplier, softcap = logit_factors(self.causal_lm.config)
        return Head(
            weight=layer.weight,
            bias=getattr(layer, "bias", None),
            vocabulary=self.vocabulary,
            multiplier=multiplier,
            softcap=softcap,
            unwritten=self._unwritten(layer.weight.device),
        )

    def _unwritten(self, device: torch.device) -> Tensor | None:
        ids = sorted(i for i in self.unwritten if i < self.vocabulary)
        return torch.tensor(ids, device=device) if ids else None

    @property
    def sees(self) -> bool:
        """Whether it reads images: it has a processor."""
        return hasattr(self.tokenizer, "pictures")

    @property
    def patch_values(self) -> int:
        """The numbers in one patch of the encoder, as its config has them; 0 if it has no patch size."""
        encoder = getattr(self.causal_lm.config, "vision_config", None)
        size = getattr(encoder, "patch_size", None)
        sides = [size, size] if isinstance(size, int) else list(size or [])
        if len(sides) != 2:  # Florence 2 has a size of each of its four stages
            return 0
        return math.prod(sides) * getattr(encoder, "num_channels", 3) * getattr(encoder, "temporal_patch_size", 1)

    def encoded(self, ids: Sequence[int]) -> dict[int, int]:
        """The different pictures in some ids, by code, and how many positions the encoder reads of each: its patches.

        Empty for a text model. An encoder whose config has no patch size counts nothing.
        """
        if not self.sees:
            return {}
        from opd.models.pictures import codes_of

        if not (values := self.patch_values):
            return {}
        known = self.tokenizer.pictures.by_code
        return {code: known[code].values // values for code in codes_of(ids) if code in known}

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The model without its output layer: `last_hidden_state` [b, L, H] and, if requested, the cache."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        backbone = self.backbone
        if "past_key_values" in given and cache_name(type(backbone)) != "past_key_values":
            given[cache_name(type(backbone))] = given.pop("past_key_values")
        if self.sees:
            from opd.models.pictures import inputs

            with self.compute():
                input_ids, pictures = inputs(self.tokenizer.pictures, backbone, input_ids, self.name)
            given |= pictures
        from opd.models.products import faster_products

        # Gradient checkpointing computes the layers again outside the block, where the products must be the same.
        again = torch.is_grad_enabled() and self.checkpointing
        with self.compute(), faster_products(0 if again else input_ids.numel()):
            return backbone(input_ids=input_ids, **given)

    @property
    def backbone(self) -> nn.Module:
        """The model without its output layer.

        The child that `base_model_prefix` names; if it names none, as in Llama 4, the child with the input embeddings.
        """
        lm: Any = self.causal_lm
        named = getattr(lm, lm.base_model_prefix, None)
        if isinstance(named, torch.nn.Module):
            return named
        embeddings = lm.get_input_embeddings()
        inside = [child for child in lm.children() if any(module is embeddings for module in child.modules())]
        if not inside or inside[0] is embeddings:
            raise ConfigError(
                f"{self.name}: {type(lm).__name__} has no part that gives the last hidden states, so opd cannot score "
                "it. Please report the architecture."
            )
        return inside[0]

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Last hidden states [b, L, H] of right-padded rows.

        No attention mask: a causal model's valid positions never see positions to their right.
        """
        return self.forward(input_ids, use_cache=False).last_hidden_state

    @property
    def packs(self) -> bool:
        """Whether attention separates sequences of one row by position at no cost, as FlashAttention does."""
        flash = "flash" in str(getattr(self.causal_lm.config, "_attn_implementation", ""))
        return (
            flash and self.reading.shares and not self.sees
        )  # a recurrent state would go on from sequence to sequence

    @property
    def sharded(self) -> bool:
        """Whether processes hold shards of the weights (`parallel.World.shard`)."""
        return any(hasattr(module, "unshard") for module in self.model.modules())

    @property
    def caches(self) -> bool:
        """Whether a forward may use a cache.

        Not where sequences are packed in one row. Not in training with gradient checkpointing or sharded weights: there
        each forward is collective, and the number of forwards must not depend on the prefixes that rows share.
        """
        if self.packs or not self.reading.shares:
            return False
        return not (self.model.training and (self.checkpointing or self.sharded))

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is on. It has an effect in train() alone."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    @property
    def sees_everything(self) -> bool:
        """Whether every layer attends to all earlier positions.

        A sliding window counts places of the cache, so padding between a shared prefix and the rest would shift it.
        """
        config = self.causal_lm.config.get_text_config()  # type: ignore[union-attr, operator]
        kinds = getattr(config, "layer_types", None)
        if kinds:
            return set(kinds) == {"full_attention"}
        return getattr(config, "sliding_window", None) is None

    @property
    def positions(self) -> float:
        """The model's number of positions; infinite if its config does not say."""
        return positions_of(self.causal_lm.config)

    def check_length(self, tokens: int, remedy: str) -> None:
        """Raise DataError for a sequence of more `tokens` than the model has positions."""
        check_positions(self.name, tokens, self.positions, remedy)

    @property
    def rows(self) -> int:
        """The model reads and writes the ids below this: those with a row in its input and in its output layer."""
        layers = self.causal_lm.get_input_embeddings(), self.causal_lm.get_output_embeddings()  # type: ignore[operator]
        return min(len(layer.weight) for layer in layers)

    def check_ids(self, prompts: Iterable[Sequence[int]], responses: Iterable[Sequence[int]] = ()) -> None:
        """Raise DataError for a token that the model lacks: in a prompt one without a row, in a response one from V."""
        check_ids(self.name, self.tokenizer, prompts, self.rows, "prompt")
        check_ids(self.name, self.tokenizer, responses, self.vocabulary, "response")
        check_written(self.name, self.tokenizer, responses, self.unwritten)

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def casting_once(self) -> Iterator[None]:
        """Forwards inside share autocast's bfloat16 copies of the trained weights, which must not change meanwhile.

        Autocast drops the copies at the end of its outermost block, otherwise after each forward.
        """
        if not self.autocast:
            yield
            return
        kind = self.device.type
        with torch.autocast(kind, dtype=torch.bfloat16), torch.autocast(kind, enabled=False):
            yield

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; with LoRA only the adapters."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def tables(self) -> list[Tensor]:
        """The weights with a row per token: the embeddings and the output layer; one of them if they are tied."""
        layers = self.causal_lm.get_input_embeddings(), self.causal_lm.get_output_embeddings()  # type: ignore[operator]
        return [layer.weight for layer in layers if isinstance(getattr(layer, "weight", None), torch.Tensor)]

    def blocks(self) -> list[nn.Module]:
        """The layers that transformers keeps on one device, in order; empty if the model names none."""
        kinds = set(getattr(self.causal_lm, "_no_split_modules", None) or ())
        return [module for module in self.causal_lm.modules() if type(module).__name__ in kinds]


def logit_factors(config: Any) -> tuple[float, float | None]:
    """The factor on the output layer's product, and the soft cap on the result, under the names of all families."""
    config = config.get_text_config()
    given = {
        name: float(value)
        for name in ("logit_scale", "lm_head_multiplier", "logits_scaling", "logits_mup_width_multiplier", *SOFT_CAPS)
        if (value := getattr(config, name, None))
    }
    factor = given.get("logit_scale", given.get("lm_head_multiplier", 1.0))
    if config.model_type == "hyperclovax":  # Granite divides by a number of this name
        factor *= given.get("logits_scaling", 1.0)
    else:
        factor /= given.get("logits_scaling", 1.0)
    factor /= given.get("logits_mup_width_multiplier", 1.0)
    return factor, next((given[name] for name in SOFT_CAPS if name in given), None)


@functools.cache
def cache_name(backbone: type[nn.Module]) -> str:
    """The name of the cache among the arguments and results of a backbone: Mamba has another than attention."""
    parameters = inspect.signature(backbone.forward).parameters
    return "cache_params" if "cache_params" in parameters else "past_key_values"


def cache_in(out: Any) -> Any:
    """The cache in a backbone's result."""
    return out.past_key_values if "past_key_values" in out else out.cache_params


def check_ids(name: str, tokenizer: Any, rows: Iterable[Sequence[int]], limit: float, what: str) -> None:
    """Raise DataError for a token in `rows` whose id is not below `limit`, which the model `name` lacks."""
    largest = max((max(plain(ids, tokenizer), default=0) for ids in rows), default=0)
    if largest >= limit:
        token = tokenizer.convert_ids_to_tokens(largest)
        named = f"the token {token!r} (id {largest})" if token else f"the id {largest}"
        raise DataError(
            f"{name}: a {what} holds {named}, but here the model has only the ids 0 to {limit - 1:.0f}. Remove the "
            "token from the data or from the chat template, or use models that have it."
        )


def check_written(name: str, tokenizer: Any, responses: Iterable[Sequence[int]], unwritten: Collection[int]) -> None:
    """Raise DataError for a response with a token of images, which the model `name` never writes."""
    if not unwritten:
        return
    for ids in responses:
        if found := [i for i in ids if i in unwritten]:
            raise DataError(
                f"{name}: a response holds the token {tokenizer.convert_ids_to_tokens(int(found[0]))!r} (id {found[0]})"
                ", which stands for images in prompts and is never written. Remove it from the response."
            )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() inside the block: a model with gradient checkpointing cannot use its cache in train()."""
    if not any(module.training for module in model.modules()):  # as a teacher is; eval() costs four times this look
        yield
        return
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def frozen_copy(lm: LanguageModel) -> LanguageModel:
    """A copy that never trains. Parameters that are frozen in the original are shared, not copied."""
    shared = {id(p): p for p in lm.model.parameters() if not p.requires_grad}
    model = copy.deepcopy(lm.model, shared).requires_grad_(False).eval()
    return replace(lm, model=model, name=f"{lm.name} (copy)")
