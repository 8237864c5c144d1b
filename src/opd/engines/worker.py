"""Runs in vLLM's workers: `--worker-extension-cls opd.engines.worker.WeightLoader`. Imports nothing of this library.

Loading new weights fails silently in three ways in vLLM 0.32: a missing tensor leaves a model of neither weights; on a
CPU the packed copy of an output layer that shares the embedding's weights stays old; the prefix cache stays old. Here a
missing tensor is refused before the first is loaded, and the output layer is packed again. The cache is the client's
matter: it salts every request with the run and the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class WeightLoader:
    """Methods that vLLM adds to its worker, for `/collective_rpc`."""

    def opd_load(self, folder: str) -> dict[str, Any]:
        """Load the safetensors of a Hugging Face folder. Returns {"tensors": n}, or {"error": why}, with old weights.

        The first folder says which tensors there are; a later one with fewer or others is refused.
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        names = tensor_names(files)
        known: frozenset[str] = getattr(self, "_opd_names", names)
        if not names or names != known:
            missing, more = sorted(known - names)[:3], sorted(names - known)[:3]
            return {"error": f"{folder} has {len(names)} tensors, not {len(known)}: without {missing}, with {more}"}
        self._opd_names = names
        worker: Any = self
        worker.reload_weights(weights_iterator=tensors(files))
        pack_output_layer(worker.model_runner.get_model())
        return {"tensors": len(names)}

    def opd_about(self, folder: str = "") -> dict[str, Any]:
        """How many tensors the last load had, 0 before the first, and whether this worker sees `folder`."""
        return {"tensors": len(getattr(self, "_opd_names", ())), "sees": not folder or Path(folder).is_dir()}


def tensor_names(files: list[Path]) -> frozenset[str]:
    """The names of all tensors, without reading them."""
    from safetensors import safe_open

    found: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found.update(opened.keys())
    return frozenset(found)


def tensors(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """All tensors, one after the other."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)


def pack_output_layer(model: Any) -> None:
    """On a CPU, replace the packed copy of the output layer's weights. A GPU reads the weights themselves."""
    layer = getattr(model, "lm_head", None)
    if layer is None or not hasattr(layer, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm  # type: ignore[import-not-found]

    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
