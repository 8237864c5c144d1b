"""Lets vLLM's V2 model runner run on a CPU, for tests alone: Triton's interpreter, under a driver named "cpu".

The CPU build of vLLM 0.32 brings Triton without a CPU backend, and the V2 runner, which scores given tokens by
position, needs one. Put this folder on PYTHONPATH and set TRITON_INTERPRET=1 and VLLM_USE_V2_MODEL_RUNNER=1.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):
        """What Triton and vLLM read of a driver. Kernels do not reach it: the interpreter runs them."""

        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_current_target(self):
            return GPUTarget("cpu", 0, 0)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_device_interface(self):
            return torch.cpu

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError

        def get_empty_cache_for_benchmark(self):
            raise NotImplementedError

        def clear_cache(self, cache):
            raise NotImplementedError

    backends["cpu"] = Backend(compiler=None, driver=InterpreterDriver)
