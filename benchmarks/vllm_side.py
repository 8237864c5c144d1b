"""vLLM's side of generate.py, for an interpreter with vLLM and without opd: a worker as in common.py.

    python benchmarks/vllm_side.py --worker vllm MODEL_FOLDER

A request has the prompts as token ids, top-p and the number of new tokens; the answer the seconds of the call, by the
clock and of the CPU. vLLM's engine is a process of its own, so CPU seconds are those of this process and all below it.
"""

import json
import os
import sys
import time
from pathlib import Path

CONTEXT = 512  # longest prompt and response, in tokens
MEMORY = 0.3  # share of the memory of a NUMA node for the cache; by default vLLM wants nearly all and may not start


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process and all processes below it so far (Linux)."""
    stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    own = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    children = " ".join(file.read_text() for file in Path(f"/proc/{process}/task").glob("*/children"))
    return own + sum(cpu_seconds(int(child)) for child in children.split())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to stderr
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=sys.argv[-1],
        dtype="float32",
        max_model_len=CONTEXT,
        disable_log_stats=True,
        gpu_memory_utilization=MEMORY,
    )

    def call(request: dict[str, object], new_tokens: int) -> dict[str, float]:
        sampling = SamplingParams(
            temperature=1.0, top_p=request["top_p"], max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        start, cpu = time.perf_counter(), cpu_seconds(os.getpid())
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = {"seconds": time.perf_counter() - start, "seconds_cpu": cpu_seconds(os.getpid()) - cpu}
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        assert [list(output.prompt_token_ids) for output in outputs] == request["prompts"]
        return seconds

    def send(answer: dict[str, object]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    send({"ready": True})
    warm = False
    for line in sys.stdin:
        request = json.loads(line)
        warm = warm or bool(call(request, 4))
        send(call(request, request["new_tokens"]))


if __name__ == "__main__":
    main()
