"""CPU time to read a teacher's scores from a server's answer, per response token.

    python benchmarks/signals.py

The answers are made here in vLLM's format, 256 tokens with 64 entries each, and read by the library's own parsers. The
least of 5 readings, in CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import time
from collections.abc import Callable

import numpy as np

from opd.engines.vllm import parse_positions, parse_top

TOKENS, K, VOCABULARY = 256, 64, 151_936
READINGS = 5


def top_answer(ids: list[int]) -> bytes:
    """The answer with the K most likely tokens of each position; the given token is the first of them."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, dict[str, object]] | None] = [None]
    for token in ids[1:]:
        others = generator.choice(VOCABULARY, K, replace=False)
        listed = [token, *(int(one) for one in others if one != token)][:K]
        logp = -np.sort(generator.exponential(3.0, K))
        rows.append(
            {
                str(one): {"logprob": float(value), "rank": rank + 1, "decoded_token": " token"}
                for rank, (one, value) in enumerate(zip(listed, logp, strict=True))
            }
        )
    return json.dumps({"choices": [{"prompt_logprobs": rows}]}, separators=(",", ":")).encode()


def positions_answer() -> bytes:
    """The answer with the log-probs of K + 1 given tokens of each position."""
    file = io.BytesIO()
    np.save(file, np.full((TOKENS, K + 1), -3.0, dtype=np.float32))
    return json.dumps({"prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}).encode()


def microseconds(read: Callable[[bytes], object], raw: bytes) -> float:
    """CPU microseconds per token of the quickest reading."""
    times: list[float] = []
    for _ in range(READINGS):
        start = time.process_time()
        read(raw)
        times.append(time.process_time() - start)
    return min(times) / TOKENS * 1e6


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    ids = list(range(1, TOKENS + 2))
    wanted = np.zeros((TOKENS, K + 1), dtype=np.int64)
    answers = {
        f"top {K} in JSON": (parse_top(ids, 1, K), top_answer(ids)),
        f"{K} given ids by position": (parse_positions(wanted), positions_answer()),
    }
    for name, (read, raw) in answers.items():
        cost = microseconds(read, raw)
        print(
            f"{name}: {len(raw) / TOKENS:.0f} bytes and {cost:.3g} microseconds per token, {1e6 / cost:,.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
