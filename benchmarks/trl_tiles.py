"""TRL's tile sizes for a CPU, and the sweep that they come from.

    python benchmarks/trl_tiles.py

TRL's chunked kernels project [tokens, vocabulary] tiles of 4,096 x 32,768 entries, sizes made for a GPU. They are
constants of its modules. On a CPU small tiles stay in the cache, which makes the kernels faster and smaller. The sweep
runs forward and backward of the divergence at V = 49,152, N = 1,024, H = 96 (the student of step.py; its teacher has
H = 384) with one thread, in turns, and prints medians of CPU seconds. In two sweeps on two cores 256 x 4,096 took the
least, 0.56 and 0.50 of the time of TRL's own sizes; 128 x 4,096 took 0.62 and 0.55.
"""

from __future__ import annotations

import time
from statistics import median

import torch

CPU_TILES = (256, 4096)  # tokens x vocabulary
SWEEP = ((4096, 32768), (128, 2048), (128, 4096), (128, 8192), (256, 2048), (256, 4096), (256, 8192), (512, 4096))
ROUNDS = 5
V, N, H_STUDENT, H_TEACHER = 49_152, 1024, 96, 384


def tiles() -> tuple[int, int]:
    """TRL's present tiles: tokens x vocabulary."""
    from trl.kernels import chunked_divergence

    return chunked_divergence.TOKEN_CHUNK_SIZE, chunked_divergence.VOCAB_CHUNK_SIZE


def set_tiles(tokens: int = CPU_TILES[0], vocabulary: int = CPU_TILES[1]) -> None:
    """Set the tiles of TRL's divergence and of its log-prob kernel in this process.

    The log-prob kernel takes the second size as an argument; TRL's trainers pass the constant of `trl.trainer.utils`.
    """
    from trl.kernels import chunked_divergence, chunked_logprob
    from trl.trainer import utils

    chunked_divergence.TOKEN_CHUNK_SIZE = chunked_logprob.TOKEN_CHUNK_SIZE = tokens
    chunked_divergence.VOCAB_CHUNK_SIZE = utils._CHUNKED_LOGPROB_CHUNK_SIZE = vocabulary


def main() -> None:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    torch.set_num_threads(1)
    student, teacher = torch.randn(V, H_STUDENT) / H_STUDENT**0.5, torch.randn(V, H_TEACHER) / H_TEACHER**0.5
    hidden, teacher_hidden = torch.randn(1, N, H_STUDENT), torch.randn(1, N, H_TEACHER)
    mask = torch.ones(1, N, dtype=torch.long)
    seconds: dict[tuple[int, int], list[float]] = {sizes: [] for sizes in SWEEP}
    for _ in range(ROUNDS):
        for sizes, times in seconds.items():
            set_tiles(*sizes)
            x, head = hidden.clone().requires_grad_(), student.clone().requires_grad_()
            started = time.process_time()
            _chunked_divergence_loss(x, teacher_hidden, head, teacher, mask, beta=1.0)[0].backward()
            times.append(time.process_time() - started)
    for (tokens, vocabulary), times in seconds.items():
        print(f"{tokens:5} tokens x {vocabulary:6,}: {median(times):.2f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
