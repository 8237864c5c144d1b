"""A small server with the protocol of vLLM that also writes responses, with weights or adapters that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.engines import Engine, refused
from support.http_server import Said

CONTROL = ("/collective_rpc", "/update_weight_version")


@dataclass
class DrawingEngine(Engine):
    """Draws a request's tokens from its seed alone. `names`: of the tensors of the first folder, as in the worker."""

    name: str = "student"
    longest: int = 512
    version: str = "default"
    names: frozenset[str] = frozenset()
    loads: list[str] = field(default_factory=list)  # folders of weights, in order

    @property
    def drawn(self) -> list[dict[str, Any]]:
        """The requests for responses, in order of arrival, without those of the check at the start."""
        found = [one.request for one in self.arrived if one.target == "/inference/v1/generate"]
        return [one for one in found if one["cache_salt"] != "opd-mode"]

    def _said(self, target: str, request: dict[str, Any], ids: Any) -> Said:
        if target == "/collective_rpc" and request["method"] == "opd_load":
            return Said(body={"results": [self._load(Path(request["kwargs"]["folder"]))]})
        if target == "/update_weight_version":
            self.version = request["new_version"]
            return Said(body={"message": "ok"})
        params = request.get("sampling_params", {})
        wrong_model = request.get("model") not in (None, self.name)
        if target == "/inference/v1/generate" and "prompt_logprob_token_ids" not in params and not wrong_model:
            return self._draw(list(ids), params)
        return super()._said(target, request, ids)

    def _load(self, folder: Path) -> dict[str, Any]:
        state: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        if not state or (self.names and self.names != state.keys()):
            return {"error": f"{folder} has {len(state)} tensors, not {len(self.names)}"}
        self.names = frozenset(state)
        self.loads.append(folder.name)
        left = self.lm.causal_lm.load_state_dict(state, strict=False)
        assert not left.unexpected_keys
        return {"tensors": len(state)}

    @torch.no_grad()
    def _draw(self, ids: list[int], params: Mapping[str, Any]) -> Said:
        generator = torch.Generator().manual_seed(params["seed"] % 2**63)
        taken: list[int] = []
        logps: list[float] = []
        reason = "length"
        for _ in range(params["max_tokens"]):
            logits = self.lm.model(input_ids=torch.tensor([ids + taken]), use_cache=False).logits[0, -1].float()
            logp = processed(logits[: self.lm.vocabulary], params)
            token = int(logp.exp().multinomial(1, generator=generator)) if params["temperature"] else int(logp.argmax())
            taken.append(token)
            logps.append(float(logp[token]))
            if token in params.get("stop_token_ids", ()):
                reason = "stop"
                break
        content = [{"token_id": one, "logprob": logp} for one, logp in zip(taken, logps, strict=True)]
        spans = [{"version": self.version, "start": 0, "end": len(taken)}]
        choice = {"index": 0, "token_ids": taken, "finish_reason": reason, "logprobs": {"content": content}}
        return Said(body={"choices": [choice | {"weight_versions": spans}]})


def processed(logits: torch.Tensor, params: Mapping[str, Any]) -> torch.Tensor:
    """The log-probs [V] of the distribution that tokens are drawn from: after temperature, top-k and top-p."""
    logits = logits / (params["temperature"] or 1.0)
    if params.get("top_k"):
        logits = logits.masked_fill(logits < logits.topk(params["top_k"]).values[-1], -torch.inf)
    if params.get("top_p", 1.0) < 1.0:
        probs, order = logits.softmax(-1).sort(descending=True)
        outside = order[probs.cumsum(-1) - probs >= params["top_p"]]
        logits = logits.index_fill(0, outside, -torch.inf)
    return logits.log_softmax(-1)


__all__ = ["DrawingEngine", "refused"]
