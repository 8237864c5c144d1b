"""Texts -> vectors of length 1, with a text encoder of transformers: the mean of its last states over the tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opd.data.similarity import Embeddings
from opd.errors import ConfigError, incomplete
from opd.files import expanded, tensor_shapes

BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A text encoder. Make it with `load_encoder`."""

    tokenizer: Any
    model: Any
    limit: int  # largest number of tokens read per text

    def embed(self, texts: Sequence[str]) -> tuple[Embeddings, int]:
        """(vectors [n, H], the number of texts cut to the limit).

        A vector is the mean state of all tokens but padding, divided by its norm. Texts of similar length form a batch.
        The batch changes a vector only by rounding, through padding.
        """
        assert texts
        lengths = [len(ids) for ids in self.tokenizer(list(texts)).input_ids]
        order = sorted(range(len(texts)), key=lambda i: lengths[i])
        found: list[np.ndarray] = []
        for start in range(0, len(order), BATCH):
            found.append(self._batch([texts[i] for i in order[start : start + BATCH]]))
        values = np.concatenate(found)[np.argsort(order)]
        return Embeddings(values), sum(length > self.limit for length in lengths)

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> np.ndarray:
        """[n, H]"""
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
        read = read.to(self.model.device)
        states = self.model(**read).last_hidden_state.float()  # [n, T, H]
        mask = read["attention_mask"][..., None].float()  # [n, T, 1]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu().numpy()


def load_encoder(path: str) -> Encoder:
    """The encoder of a folder or hub id, as sentence-transformers would use all-mpnet-base-v2.

    At most `max_seq_length` tokens of a text are read, if the folder sets it. Weights come from safetensors, and code
    in the folder is not run. Raises ConfigError for a path without an encoder, and for an encoder with another pooling
    than the mean.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    local = expanded(path)
    path = str(local) if local.is_dir() else path
    for file in sorted(local.glob("*.safetensors")):
        tensor_shapes(file, "`select.encoder`")  # names a damaged file
    how: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        loaded: Any = AutoModel.from_pretrained(path, dtype=torch.float32, ignore_mismatched_sizes=True, **how)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"`select.encoder`: {path} could not be loaded as a text encoder: {error} Give the folder or hub id of an "
            "encoder, such as sentence-transformers/all-mpnet-base-v2, or measure words or characters."
        ) from error
    model, info = loaded
    problem = incomplete(info, unused="pooler.")  # which reads the last states, and is not used
    if problem is None and not all(bool(p.isfinite().all()) for p in model.parameters()):
        problem = "the weights hold NaN or infinity"
    if problem:
        raise ConfigError(
            f"`select.encoder`: {path}: {problem}, so its vectors would mean nothing. Copy or download it again."
        )
    pooling = _settings(path, "1_Pooling/config.json")
    if not pooling.get("pooling_mode_mean_tokens", True):
        modes = [name for name, value in pooling.items() if value is True and name.startswith("pooling_mode")]
        raise ConfigError(
            f"`select.encoder`: {path} uses the pooling {', '.join(modes) or '(unknown)'}, but opd averages states "
            "over tokens. Give an encoder with mean pooling."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"`select.encoder`: the tokenizer of {path} has no padding token. Set its pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    limits = (
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", None),
        _settings(path, "sentence_bert_config.json").get("max_seq_length"),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Encoder(
        tokenizer=tokenizer,
        model=model.eval().to(device),
        limit=min(int(limit) for limit in limits if limit is not None),
    )


def _settings(path: str, file: str) -> dict[str, Any]:
    """A settings file of sentence-transformers; empty for folders without it."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(path, file)
    except OSError:
        return {}
    if found is None:
        return {}
    with open(str(found), encoding="utf-8") as stream:
        return json.load(stream)
