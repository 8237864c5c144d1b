"""A small server with the protocol of vLLM that also writes responses, with weights or adapters that it is given."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from support.engines import Engine, refused
from support.http_server import Said


@dataclass
class DrawingEngine(Engine):
    """Draws a request's tokens from its seed alone. `names`: of the tensors of the first folder, as in the worker."""

    name: str = "student"
    longest: int = 512
    version: str = "default"
    names: frozenset[str] = frozenset()
    loads: list[str] = field(default_factory=list)  # folders of weights, in order
    adapters: dict[str, Any] = field(default_factory=dict)  # models with an adapter, by the adapter's name
    names_used: list[str] = field(default_factory=list)  # of adapters
    max_lora_rank: int = 16

    @property
    def drawn(self) -> list[dict[str, Any]]:
        """The requests for responses, in order of arrival, without those of the proofs, which are at temperature 2."""
        found = [one.request for one in self.arrived if one.target == "/inference/v1/generate"]
        return [one for one in found if one["sampling_params"]["temperature"] != 2.0]

    def _said(self, target: str, request: dict[str, Any], ids: Any) -> Said:
        if target == "/collective_rpc" and request["method"] == "opd_load":
            return Said(body={"results": [self._load(Path(request["kwargs"]["folder"]))]})
        if target == "/update_weight_version":
            self.version = request["new_version"]
            return Said(body={"message": "ok"})
        if target == "/v1/models":
            named = [{"id": name, "parent": self.name} for name in self.adapters]
            listed = {"id": self.name, "parent": None, "max_model_len": self.longest}
            return Said(body={"object": "list", "data": [listed, *named]})
        if target == "/v1/load_lora_adapter":
            return self._load_adapter(request["lora_name"], Path(request["lora_path"]))
        if target == "/v1/unload_lora_adapter":
            if self.adapters.pop(request["lora_name"], None) is None:
                return refused(404, f"The lora adapter '{request['lora_name']}' cannot be found.")
            return Said(body=b"Success: removed.")
        params = request.get("sampling_params", {})
        models = {None: self.lm.model, self.name: self.lm.model, **self.adapters}
        if target == "/inference/v1/generate" and "prompt_logprob_token_ids" not in params:
            if request.get("model") in models:
                return self._draw(models[request.get("model")], list(ids), params)
            return refused(404, f"The model `{request['model']}` does not exist.")
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

    def _load_adapter(self, name: str, folder: Path) -> Said:
        """As PEFT reads the folder; on a copy of the base model, which stays as it is."""
        if name in self.adapters:
            return refused(400, f"The lora adapter '{name}' has already been loaded.")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return refused(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.lm.model), str(folder)).eval()
        self.names_used.append(name)
        return Said(body=b"Success: added.")

    @torch.no_grad()
    def _draw(self, model: Any, ids: list[int], params: Mapping[str, Any]) -> Said:
        generator = torch.Generator().manual_seed(params["seed"] % 2**63)
        taken: list[int] = []
        logps: list[float] = []
        reason = "length"
        for _ in range(params["max_tokens"]):
            logits = model(input_ids=torch.tensor([ids + taken]), use_cache=False).logits[0, -1].float()
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
