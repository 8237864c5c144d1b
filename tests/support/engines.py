"""A small server with the protocol of vLLM, which scores and draws with a tiny model: the shapes of 0.32."""

from __future__ import annotations

import base64
import copy
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from opd.models.language_model import LanguageModel
from support.http_server import Arrived, Said, listening


@dataclass
class Engine:
    """A model behind a server. `fault` may replace an answer; it gets the request and the answer without it."""

    lm: LanguageModel
    name: str = "teacher"
    max_logprobs: int = 20
    longest: int = 64
    scale_out: bool = True
    version: str = "default"  # of the weights
    dev: bool = True  # has the control routes
    extension: bool = True  # of the workers
    lora: bool = True  # has the routes of adapters
    processed: bool = True  # log-probs are of the distribution that is drawn from
    tensors: frozenset[str] = frozenset()  # names of those of the first folder of weights
    loads: list[str] = field(default_factory=list)  # folders of weights, in order
    adapters: dict[str, Any] = field(default_factory=dict)  # models with a LoRA adapter, by its name
    names_used: list[str] = field(default_factory=list)  # of adapters
    max_lora_rank: int = 16
    fault: Callable[[Arrived, Said], Said] = lambda arrived, said: said
    url: str = ""
    arrived: list[Arrived] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    in_flight: int = 0  # tokens
    most_in_flight: int = 0
    block: int = 128  # tokens of a block of the prefix cache
    blocks: set[tuple[int, ...]] = field(default_factory=set)  # the prefixes that are cached

    def answer(self, arrived: Arrived) -> Said:
        """The answer to a request, after `fault`."""
        ids = arrived.request.get("prompt") or arrived.request.get("token_ids") or ()
        with self.lock:
            self.arrived.append(arrived)
            self.in_flight += len(ids)
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            said = self.fault(arrived, self._said(arrived.target, arrived.request, ids))
            time.sleep(said.wait_s)
        finally:
            with self.lock:
                self.in_flight -= len(ids)
        return said

    @property
    def scored(self) -> list[dict[str, Any]]:
        """The requests for scores, in order of arrival, without those of the fixed sequence."""
        found = [one.request for one in self.arrived if one.target in ("/v1/completions", "/inference/v1/generate")]
        return [one for one in found if len(one.get("prompt") or one.get("token_ids")) != 24]

    @property
    def drawn(self) -> list[dict[str, Any]]:
        """The requests for responses, in order of arrival, without those of the proofs, which are at temperature 2."""
        found = [one.request for one in self.arrived if one.target == "/inference/v1/generate"]
        found = [one for one in found if "prompt_logprob_token_ids" not in one["sampling_params"]]
        return [one for one in found if one["sampling_params"]["temperature"] != 2.0]

    def _said(self, target: str, request: dict[str, Any], ids: Any) -> Said:
        if target == "/v1/models":
            named = [{"id": name, "parent": self.name} for name in self.adapters]
            listed = {"id": self.name, "parent": None, "max_model_len": self.longest}
            return Said(body={"object": "list", "data": [listed, *named]})
        if target in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.lora:
            return self._adapted(target, request["lora_name"], request.get("lora_path", ""))
        if request.get("model") not in (None, self.name, *self.adapters):
            return refused(404, f"The model `{request['model']}` does not exist.")
        if target in ("/collective_rpc", "/update_weight_version", "/weight_info") and not self.dev:
            return refused(404, "Not Found")
        if target == "/collective_rpc":
            return self._called(request["method"], **request["kwargs"])
        if target == "/weight_info":
            return Said(body={"weight_version": self.version})
        if target == "/update_weight_version":
            self.version = request["new_version"]
            return Said(body={"success": True})
        if target == "/detokenize":
            return Said(body={"prompt": self.lm.tokenizer.decode(request["tokens"])})
        if len(ids) >= self.longest:
            return refused(400, f"This model's maximum context length is {self.longest} tokens.")
        if target == "/v1/completions":
            return self._completion(ids, int(request["prompt_logprobs"]))
        if target == "/inference/v1/generate" and self.scale_out:
            params, model = request["sampling_params"], self.adapters.get(request["model"], self.lm.model)
            by_position = "prompt_logprob_token_ids" in params
            return self._positions(ids, params) if by_position else self._drawn(ids, params, model)
        if target == "/inference/v1/generate":
            return refused(403, "Start the server with --enable-scale-out.")
        return refused(404, "Not Found")

    def _logits(self, ids: Any, model: Any = None) -> Tensor:
        with torch.no_grad():
            row = torch.tensor([ids], device=self.lm.device)
            return (
                (model or self.lm.model)(input_ids=row, use_cache=False)
                .logits[0, :, : self.lm.vocabulary]
                .float()
                .cpu()
            )

    def _logp(self, ids: Any) -> Tensor:
        return self._logits(ids)[:-1].log_softmax(-1)

    def _completion(self, ids: Any, k: int) -> Said:
        if k > self.max_logprobs:
            return refused(400, f"Requested prompt logprobs of {k}, which is greater than max allowed.")
        rows: list[Any] = [None]
        for token, logp in zip(ids[1:], self._logp(ids), strict=True):
            top = logp.topk(k).indices.tolist()
            rank = int((logp > logp[token]).sum()) + 1
            ranks = {token: rank} | {other: place for place, other in enumerate(top, 1)}
            rows.append(
                {
                    str(one): {"logprob": float(logp[one]), "rank": at, "decoded_token": self.lm.tokenizer.decode(one)}
                    for one, at in ranks.items()
                }
            )
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "prompt_logprobs": rows}
        return Said(body={"object": "text_completion", "model": self.name, "choices": [choice]})

    def _positions(self, ids: Any, params: dict[str, Any]) -> Said:
        wanted = np.array(params["prompt_logprob_token_ids"])
        if wanted.shape[1] > self.max_logprobs:
            return refused(400, f"Set max_logprobs (--max-logprobs) to at least {wanted.shape[1]}.")
        logp = self._logp(ids)[params["prompt_logprob_start"] :]
        if len(logp) != len(wanted):
            return refused(400, f"prompt_logprob_token_ids has {len(wanted)} rows, but {len(logp)} are scored.")
        blocks = [tuple(ids[:end]) for end in range(self.block, len(ids), self.block)]
        with self.lock:
            cached = self.block * sum(one in self.blocks for one in blocks)
            self.blocks.update(blocks)
        if not params["skip_reading_prefix_cache"] and cached > params["prompt_logprob_start"]:
            return Said(body={"choices": [{"index": 0, "token_ids": [0]}], "prompt_token_id_logprobs": None})
        values = logp.gather(1, torch.from_numpy(wanted)).numpy()
        return Said(body={"choices": [{"index": 0, "token_ids": [0]}], "prompt_token_id_logprobs": packed(values)})

    def _drawn(self, ids: Any, params: dict[str, Any], model: Any) -> Said:
        """A response by the request's seed alone."""
        ends = params.get("stop_token_ids", ())
        generator, drawn, content = torch.Generator().manual_seed(params["seed"]), [], []
        while len(drawn) < params["max_tokens"] and not (drawn and drawn[-1] in ends):
            raw = self._logits([*ids, *drawn], model)[-1]
            logp = processed(raw, params)
            greedy = not params["temperature"]
            drawn.append(int(logp.argmax() if greedy else torch.multinomial(logp.exp(), 1, generator=generator)))
            shown = logp if self.processed else raw.log_softmax(-1)
            content.append({"logprob": float(shown[drawn[-1]]), "token_id": drawn[-1]})
        choice = {
            "index": 0,
            "token_ids": drawn,
            "finish_reason": "stop" if drawn[-1] in ends else "length",
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(drawn)}],
        }
        return Said(body={"choices": [choice]})

    def _adapted(self, target: str, name: str, folder: str) -> Said:
        if target == "/v1/load_lora_adapter":
            return self._load_adapter(name, Path(folder))
        if self.adapters.pop(name, None) is None:
            return refused(404, f"The lora adapter '{name}' cannot be found.")
        return Said(body=b"Success: removed.")

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

    def _called(self, method: str, folder: str = "") -> Said:
        if not self.extension:
            return Said(status=500, body={"error": {"message": f"'Worker' object has no attribute '{method}'"}})
        if method == "opd_about":
            sees = not folder or Path(folder).is_dir()
            return Said(body={"results": [{"tensors": len(self.tensors), "sees": sees}]})
        assert method == "opd_load"
        return Said(body={"results": [self._load(Path(folder))]})

    def _load(self, folder: Path) -> dict[str, Any]:
        """As the worker's extension: a folder with other tensors than the first one is refused."""
        state = {
            name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        if not state or (self.tensors and self.tensors != state.keys()):
            return {"error": f"{folder} has {len(state)} tensors, not {len(self.tensors)}"}
        self.tensors = frozenset(state)
        self.loads.append(folder.name)
        left = self.lm.causal_lm.load_state_dict(state, strict=False)  # shared weights are in the file once
        assert not left.unexpected_keys
        return {"tensors": len(state)}


def processed(logits: Tensor, params: dict[str, Any]) -> Tensor:
    """The log-probs [V] of the distribution that tokens are drawn from: after temperature, top-k and top-p."""
    logits = logits / (params["temperature"] or 1.0)
    if params.get("top_k"):
        logits = logits.masked_fill(logits < logits.topk(params["top_k"]).values[-1], -torch.inf)
    if params.get("top_p", 1.0) < 1.0:
        probs, order = logits.softmax(-1).sort(descending=True)
        outside = order[probs.cumsum(-1) - probs >= params["top_p"]]
        logits = logits.index_fill(0, outside, -torch.inf)
    return logits.log_softmax(-1)


def packed(values: np.ndarray) -> str:
    """An array as the server sends it."""
    file = io.BytesIO()
    np.save(file, values)
    return base64.b64encode(file.getvalue()).decode()


def refused(status: int, why: str) -> Said:
    return Said(status=status, body={"error": {"message": why, "type": "BadRequestError", "code": status}})


@contextmanager
def running(*engines: Engine) -> Iterator[list[str]]:
    """The addresses of the engines, which answer until the block ends."""
    if not engines:
        yield []
        return
    with listening(engines[0].answer) as url, running(*engines[1:]) as others:
        engines[0].url = url
        yield [url, *others]


def spoilt(change: Callable[[dict[str, Any]], Any], times: int = 10**9) -> Callable[[Arrived, Said], Said]:
    """A fault that changes the body of the first `times` scores of responses."""
    left = [times]

    def fault(arrived: Arrived, said: Said) -> Said:
        ids = arrived.request.get("prompt") or arrived.request.get("token_ids") or ()
        if len(ids) in (0, 24) or left[0] <= 0:
            return said
        left[0] -= 1
        changed = change(said.body)
        return changed if isinstance(changed, Said) else replace(said, body=changed)

    return fault
