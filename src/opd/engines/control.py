"""Whether an engine's servers can take a student's weights and draw its responses. Nothing of them is changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from opd.engines.capabilities import control_ids, of_each
from opd.engines.replicas import Replicas
from opd.engines.server import Answer, BodyError
from opd.engines.vllm import Drawn, draw_fields, member_of, parse_drawn, sampling_fields, workers_in
from opd.errors import ConfigError
from opd.types import Sampling

DRAWN = 16  # tokens of the trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Able:
    """What one server of an engine says about itself."""

    version: str  # of its weights
    tensors: int  # of the last update; 0 before the first


def check_control(replicas: Replicas, model: str, vocabulary: int, folder: str | None) -> dict[str, Able]:
    """Look at every server once: its control routes, the worker extension, a draw, and `folder` if it is given.

    Raises:
        ConfigError: a server lacks one of them. The message says which flag it needs.
    """
    weights = of_each(replicas, lambda one: one.get("weight_info", _version), "its weights' version", ROUTES)
    fields = {"method": "opd_about", "kwargs": {} if folder is None else {"folder": folder}}
    workers = of_each(replicas, lambda one: one.post("collective_rpc", fields, _about), "what it has loaded", EXTENSION)
    for url, about in workers.items():
        if folder is not None and not about["sees"]:
            raise ConfigError(
                f"The server {url} does not see the folder {folder}, through which it gets the weights. Set the "
                "engine's `folder` to one that trainer and servers share."
            )
    check_draws(replicas, model, vocabulary)
    return {url: Able(version=weights[url], tensors=int(about["tensors"])) for url, about in workers.items()}


def check_transfer(replicas: Replicas, model: str, vocabulary: int) -> dict[str, int]:
    """Look at every server once, for `weights: transfer`: its control routes and a draw. How many workers it has.

    Whether it has a weight transfer engine shows at the first update only. Raises ConfigError as `check_control`.
    """
    workers = of_each(replicas, lambda one: one.get("get_world_size", workers_in), "its number of workers", ROUTES)
    check_draws(replicas, model, vocabulary)
    return workers


def check_adapters(replicas: Replicas, model: str, vocabulary: int) -> None:
    """Look at every server once: its routes for LoRA adapters, and a draw. Raises ConfigError, as `check_control`."""
    of_each(
        replicas,
        lambda one: _of_no_adapter(one.post("v1/unload_lora_adapter", {"lora_name": NO_ADAPTER}, lambda raw: True)),
        "its routes for adapters",
        "Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and `--enable-lora`.",
    )
    check_draws(replicas, model, vocabulary)


def _of_no_adapter(answer: Answer[bool]) -> Answer[bool]:
    """A server with the routes refuses to unload an adapter that it does not have, by its name."""
    there = answer.value is None and NO_ADAPTER in str(answer.failure)
    return replace(answer, value=True, failure=None) if there else answer


NO_ADAPTER = "opd-of-no-adapter"
ROUTES = "Start it with VLLM_SERVER_DEV_MODE=1."
EXTENSION = (
    "Start it with `--worker-extension-cls opd.engines.worker.WeightLoader`, in an environment that has this version "
    "of the library."
)
DRAWS = "Start it with --enable-scale-out."


def check_draws(replicas: Replicas, model: str, vocabulary: int) -> None:
    """Refuse servers whose log-probs are not of the distribution that they draw from. Raises ConfigError.

    With top-k 1 that distribution has one token, of log-prob 0, whatever the weights are.
    """
    params = sampling_fields(Sampling(top_k=1), DRAWN, ())
    prompt = control_ids(vocabulary)[:8]
    fields = draw_fields(model, prompt, params, seed=0, salt="opd-live")
    drawn: dict[str, Drawn] = of_each(
        replicas, lambda one: one.post("inference/v1/generate", fields, parse_drawn), "a response", DRAWS
    )
    for url, one in drawn.items():
        if (least := min(one.logp)) < -1e-3:
            raise ConfigError(
                f"The server {url} gives other log-probs than those of the distribution that it draws from: "
                f"{least:.3g} for the only token that top-k 1 leaves, not 0. Start it with `--logprobs-mode "
                "processed_logprobs`."
            )
        if not one.versions:
            raise ConfigError(
                f"The server {url} does not say which weights drew a token. vLLM does since 0.32: use that or newer."
            )


def _version(raw: bytes) -> str:
    return str(member_of(raw, "weight_version"))


def _about(raw: bytes) -> dict[str, Any]:
    """What the first worker says about itself. Raises BodyError if one says nothing."""
    results = member_of(raw, "results")
    for one in results:
        if not isinstance(one, dict) or not {"tensors", "sees"} <= one.keys():
            raise BodyError("a worker does not say what it has loaded")
    if not results:
        raise BodyError("no worker has answered")
    return {"tensors": results[0]["tensors"], "sees": all(one["sees"] for one in results)}
