"""A transformers model as a LanguageModel, with the checks of its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from opd.errors import ConfigError
from opd.models import adapters
from opd.models.adapter_files import refuse_kind
from opd.models.endings import endings_of, generation_ids
from opd.models.language_model import LanguageModel, evaluating
from opd.models.noise import remember_noise
from opd.models.probe import notes_on, probe
from opd.models.processors import image_tokens


def wrap(model: nn.Module, tokenizer: Any, *, name: str = "model", **options: Any) -> LanguageModel:
    """A model and tokenizer as a LanguageModel: dropout off, head verified. Raises ConfigError for an unfit model.

    Dropout is off because the trained distribution must be the distribution that writes.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{name} is {model!r:.80} ({type(model).__name__}). Give a path, a hub id, or a model object of "
            "transformers or peft."
        )
    if tokenizer is None:
        raise ConfigError(f"{name}: a model object needs its tokenizer; pass `tokenizer=`.")
    adapters.check_tied(model)
    remember_noise(model)
    disable_noise(model)
    endings = endings_of(
        tokenizer,
        options.get("template_options", {}),
        generation=generation_ids(getattr(model, "generation_config", None)),
    )
    lm = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        vocabulary=max(tokenizer.get_vocab().values()) + 1,
        stop_ids=endings.stops,
        name=name,
        **options,
    )
    if not lm.stop_ids:
        raise ConfigError(
            f"{name}: the tokenizer has no end-of-sequence token, so no response could end. Set eos_token."
        )
    refuse_adapters(lm)
    lm = replace(lm, unwritten=image_tokens(tokenizer, lm.causal_lm.config))
    lm = within_rows(lm)
    verify_head(lm)
    lm = replace(lm, reading=probe(lm))
    return replace(lm, notes=(*lm.notes, *notes_on(lm)))


def refuse_adapters(lm: LanguageModel) -> None:
    """Raise ConfigError for an adapter that is not part of the model's layers."""
    for settings in getattr(lm.model, "peft_config", {}).values():
        refuse_kind(str(getattr(settings.peft_type, "value", settings.peft_type)), lm.name)


def within_rows(lm: LanguageModel) -> LanguageModel:
    """The model without the added tokens that have no row in its layers, such as a new padding token; with a note.

    Raises ConfigError if tokens of text have none, and if no response could end.
    """
    if lm.rows >= lm.vocabulary:
        return lm
    tokens = lm.tokenizer.get_vocab()
    absent = {i: token for token, i in sorted(tokens.items(), key=lambda item: item[1]) if i >= lm.rows}
    if any(i not in lm.tokenizer.added_tokens_decoder for i in absent) or min(lm.stop_ids) >= lm.rows:
        raise ConfigError(
            f"{lm.name}: the tokenizer has ids up to {lm.vocabulary - 1}, but the output layer has only "
            f"{lm.rows} rows. Use the model's own tokenizer, or resize_token_embeddings."
        )
    stops = frozenset(i for i in lm.stop_ids if i < lm.rows)
    notes = (*lm.notes, rows_note(lm.name, list(absent.values()), lm.rows))
    return replace(lm, vocabulary=lm.rows, stop_ids=stops, notes=notes)


def rows_note(name: str, absent: Sequence[str], rows: int) -> str:
    some = f"{', '.join(map(repr, absent[:3]))}{', ...' if len(absent) > 3 else ''}"
    return (
        f"{name}: {len(absent)} tokens of its tokenizer ({some}) have no row in its layers of {rows} rows; they are "
        "never written, and no prompt may hold them"
    )


@torch.no_grad()
def verify_head(lm: LanguageModel) -> None:
    """Raise ConfigError if the model's logits differ from `head(hidden)`; checked on four tokens."""
    head = replace(lm.head(), unwritten=None)
    ids = torch.arange(4, device=lm.device)[None] % lm.vocabulary
    with evaluating(lm.model), lm.compute():
        try:
            expected = lm.model(input_ids=ids, use_cache=False).logits[..., : lm.vocabulary].float()
        except Exception as error:  # an architecture that needs more than tokens may raise anything
            raise ConfigError(
                f"{lm.name}: {type(lm.causal_lm).__name__} could not read a row of tokens: {error!r:.300}. Use a model "
                "that reads token ids alone."
            ) from error
        hidden = lm.hidden(ids)
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ConfigError(
            f"{lm.name}: the output layer of {type(lm.causal_lm).__name__} reads {head.weight.shape[1]} numbers, and "
            f"its last hidden states have {hidden.shape[-1]}. opd does not support a layer between them."
        )
    got = head.logits(hidden)
    worst = (got - expected).abs().max().item()
    scale = expected.abs().max().item()
    rounding = torch.finfo(torch.bfloat16 if lm.autocast else head.weight.dtype).eps
    if not worst <= max(1e-4, 2 * rounding) * scale + 1e-5:
        raise ConfigError(
            f"{lm.name}: {type(lm.causal_lm).__name__} computes logits in a way that opd does not support: they differ "
            f"from head(hidden) by up to {worst:.3g} (largest logit {scale:.3g}). Please report the architecture."
        )


def disable_noise(model: nn.Module) -> None:
    """Set every dropout probability, and the jitter of routers' inputs, to 0.

    In the modules; dropout also in the config, which some models read. PhiMoE's `router_jitter_noise` stays, because
    eval() uses it as a threshold.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            noise = "drop" in name or ("jitter" in name and name != "router_jitter_noise")
            if noise and isinstance(value, float):  # passed to functions in the forward
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name, value in vars(config).items() if config is not None else ():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
