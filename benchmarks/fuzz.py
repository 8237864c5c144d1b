"""Random recipes of tiny models: what `opd check` accepts trains its steps; what it refuses, it refuses with a message.

python benchmarks/fuzz.py                      300 recipes that the check accepts, of seed 0
python benchmarks/fuzz.py --recipes 20 --seed 7
python benchmarks/fuzz.py --only 7-23          one recipe, printed as YAML, with its traceback

A recipe is drawn from its number: a method or a combination, any of its options by their types (supports, forms,
contexts), sampling, tasks, rewards, LoRA, precision, templates and evaluations. Exit status 1 for a fault: an error
that is not one of opd's, or an accepted recipe that does not train. A step in which no response passes a filter
depends on what the model writes, and is counted apart.
"""

from __future__ import annotations

import argparse
import inspect
import os
import random
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common import HERE

sys.path.insert(0, str(HERE.parent / "tests"))

COMBINED = ["vopd+eff_opd", "prune_opd+eff_opd", "anti_sd+eff_opd", "topk_reverse_kl+eff_opd", "opd+eff_opd"]
COMBINED += ["extrapolated_opd+eff_opd"]
TWO_TOKENIZERS = ("simct", "uld")
SELF_TAUGHT = ("context_distillation", "opsd", "sdft", "sdpo", "anti_sd", "visd", "grpo", "ropd")
POLICY_GRADIENTS = ("grpo", "ropd", "anti_sd", "uni_opd", "visd", "opd", "eff_opd", "vopd", "iw_opd")
POLICY_GRADIENTS += ("extrapolated_opd", "local_support_matching", "mopd", "top_d", "sod", "tcod")
REWARDED = ("grpo", "anti_sd", "uni_opd", "sdpo", "mopd", "sod", "anti_sd+eff_opd")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
# Options whose type does not say which values are near those of a use; others are drawn by their type.
VALUES: dict[str, list[Any]] = {
    "temperature": [0.5, 1.0, 2.0],
    "template": [None, "{privileged_context}{prompt}", "{prompt};{privileged_context}"],
    "system": [None, "1+1;"],
    "prefill": [None, "1;"],
    "examples": [None, [["1+1=", "2"]]],
    "mask_tokens": [[], ["+"], [[5, 6]]],
    "must_contain": [None, "1"],
    "ratio_bounds": [None, [0.5, 2.0]],
    "budget": [2, 3],
    "budget_min": [1, 2],
    "budget_max": [3, 4],
    "budget_step": [1],
    "margin": [1],
    "every": [1, 2],
    "length": [None, 4],
    "decay": [0.5, 0.99],
    "strength": [0.5, 1.0, 1.3],
    "bound": [1.2, 5.0],
    "least_mass": [0.0, 0.5],
    "alpha": [0.2, 1.0],
    "least_ratio": [0.2, 1.0],
    "most_ratio": [1.0, 5.0],
    "rounds": [1, 2],
    "opening": ["{prompt}"],
    "reply": ["{prompt}{debate}"],
    "reads": ["{prompt}{debate}", "{debate}{prompt}"],
    "turn": ["{text}"],
    "tag": [r"1(\d)", r"(\d)"],
}
DEBATE = ("opening", "reply", "reads", "turn", "tag")  # the defaults are in other characters than the tokenizer's


def drawn(rng: random.Random) -> dict[str, Any]:
    """A recipe as a mapping. Its paths are relative to a folder that `write_data` has filled."""
    from opd.methods import METHODS

    method = rng.choice([*METHODS, *METHODS, *COMBINED])
    chat = rng.random() < 0.3
    student, teacher = models(rng, method, chat)
    names = ["only"] if rng.random() < 0.7 else ["first", "second"]
    n = (
        rng.choice([2, 3])
        if set(method.split("+")) & {"grpo", "ropd", "anti_sd", "uni_opd", "visd", "sdpo", "mopd", "top_d"}
        else rng.choice([1, 2, 3])
    )
    plain = rng.random() < 0.8 and bool(set(method.split("+")) & {*POLICY_GRADIENTS})
    tasks = {name: task(rng, method, chat, n, plain) for name in names}
    stage: dict[str, Any] = {
        "name": "fuzz",
        "train": "student",
        "method": method,
        "options": options(rng, method, plain),
        "steps": 2,
        "prompts_per_step": rng.choice([2, 4]),
        "micro_batch_tokens": rng.choice([16, 64, 4096]),
        "optimizer": {
            "learning_rate": rng.choice([1e-4, 1e-2]),
            "schedule": rng.choice(["constant", "linear", "cosine"]),
            "warmup_steps": rng.choice([0, 1, 2]),
            "weight_decay": rng.choice([0.0, 0.1]),
        },
        "checkpoint": {"every": rng.choice([1, 2, 50])},
        "samples_every": rng.choice([0, 1, 10]),
    }
    if rng.random() < 0.2 and method not in ("sft", "grpo", "ropd", *TWO_TOKENIZERS):
        stage["diagnostics"] = {"every": 1, "k": 3, "bucket": 2}
    if len(names) == 1:
        stage |= tasks["only"]
    else:
        stage |= {"tasks": tasks, "task_order": rng.choice(["alternate", "mixed"])}
    used = {"student": student} | ({"teacher": teacher} if any("teacher" in one for one in tasks.values()) else {})
    if "extrapolated_opd" in method and rng.random() < 0.9:
        own = "lora" in student and rng.random() < 0.5
        stage["base"] = "student" if own else "base"
        used |= {} if own else {"base": {**student, "seed": 9}}
    return {"name": "fuzz", "seed": rng.randrange(100), "output_dir": "run", "models": used, "stages": [stage]}


def models(rng: random.Random, method: str, chat: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model sections of student and teacher."""
    from support.runs import CHARACTERS, tiny_model

    template = {"chat_template": TEMPLATE} if chat else {}
    student = tiny_model(rng.randrange(5), **template)
    teacher = tiny_model(rng.randrange(5, 9), hidden_size=rng.choice([16, 24]), **template)
    if rng.random() < 0.3:
        student["lora"] = {
            "rank": rng.choice([1, 4]),
            "target_modules": rng.choice(["all-linear", ["q_proj"], ".*(gate|up)_proj"]),
        }
    if rng.random() < 0.15:
        student["dtype"] = teacher["dtype"] = "bfloat16"
    if rng.random() < 0.15:
        student["gradient_checkpointing"] = True
    if rng.random() < 0.15:
        teacher["offload"] = True
    if method in TWO_TOKENIZERS and rng.random() < 0.8:
        teacher["tokenizer"] = {"characters": CHARACTERS, "merges": [["1", "+"], ["2", "="]]}
    return student, teacher


def task(rng: random.Random, method: str, chat: bool, n: int, plain: bool) -> dict[str, Any]:
    """The fields of a task: prompts, sampling, and perhaps a teacher, a reward and an evaluation."""
    data: dict[str, Any] = {"path": "train.jsonl", "chat": chat}
    if rng.random() < 0.2:
        data |= {"skip": 1, "limit": 6}
    if rng.random() < 0.1:
        data["template"] = "{prompt};"
    if rng.random() < 0.1:
        data["select"] = {"distinct": True, "measure": rng.choice(["exact", "characters"])}
    drawn_from = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if plain else {}
    found: dict[str, Any] = {"data": data, "sampling": sampling(rng) | {"n": n} | drawn_from}
    if rng.random() < (0.05 if method.split("+")[0] in SELF_TAUGHT else 0.95):
        found["teacher"] = "teacher"
    if method == "ropd":
        asked = {"column": "response", "max_failed": 1.0}
        found["reward"] = {"name": "rubric", "options": asked, "judge": {"function": "fuzz_judge:judge"}}
    elif rng.random() < 0.5 or "eff_opd" in method or method in REWARDED:
        found["reward"] = reward(rng)
    if rng.random() < 0.2:
        settings = {"greedy": {"temperature": 0, "max_completion_length": 2}, "drawn": sampling(rng)}
        found["evaluate"] = {
            "data": {"path": "held_out.jsonl", "chat": chat},
            "reward": reward(rng),
            "sampling": settings,
            "every": rng.choice([0, 1]),
            "kl": "teacher" in found and method not in TWO_TOKENIZERS and rng.random() < 0.5,
            "teacher": "teacher" in found and rng.random() < 0.4,
        }
    return found


def sampling(rng: random.Random) -> dict[str, Any]:
    return {
        "max_completion_length": rng.choice([1, 3, 5]),
        "temperature": rng.choice([1.0, 1.0, 0.7, 0.0]),
        "top_p": rng.choice([1.0, 1.0, 0.8]),
        "top_k": rng.choice([0, 0, 3]),
        "n": rng.choice([1, 2, 3]),
        "stop": rng.choice([[], [], ["1"], ["+", "="]]),
    }


def reward(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        [
            {"name": "exact"},
            {"name": "final_number"},
            {"name": "regex", "options": {"pattern": "[0-9]"}},
            {"name": "max_words", "options": {"n": 2}},
        ]
    )


def options(rng: random.Random, method: str, plain: bool) -> dict[str, Any]:
    """Some options of a method, or of each part of a combination, by the types of its signature.

    `plain`: without a temperature, which a policy gradient must share with its sampling.
    """
    from opd.methods import METHODS

    if "+" in method:
        return {name: options(rng, name, True) for name in method.split("+")}
    hints = get_type_hints(METHODS[method])
    names = [name for name in inspect.signature(METHODS[method]).parameters if rng.random() < 0.35]
    names = [name for name in names if not (plain and name == "temperature")]
    if {"budget", "budget_min", "budget_max"} & {*names}:
        names = [*dict.fromkeys([*names, "budget", "budget_min", "budget_max"])]
    if method == "prune_opd":
        names = [*dict.fromkeys([*names, "stop", "every", "budget", "budget_min", "budget_max"])]
    if method == "context_distillation":
        names = [*dict.fromkeys([*names, "template"])]
    if method == "mad_opd":
        names = [*dict.fromkeys([*names, *DEBATE])]
    if "k" in hints and "k" not in names:
        names.append("k")  # the defaults are larger than the vocabulary
    return {
        name: VALUES[name][rng.randrange(len(VALUES[name]))] if name in VALUES else value(rng, hints[name])
        for name in names
    }


def value(rng: random.Random, hint: Any) -> Any:
    """A value of a type."""
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        return value(rng, rng.choice(get_args(hint)))
    if kind is Literal:
        return rng.choice(get_args(hint))
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        return rng.randint(1, 6)
    if hint is float:
        return round(rng.uniform(0.0, 1.0), 2)
    return None


def write_data(folder: Path) -> None:
    from support.judges import COUNTING_JUDGE
    from support.runs import sums, write_rows

    write_rows(folder / "train.jsonl", sums(0, 12))
    write_rows(folder / "held_out.jsonl", sums(12, 4))
    (folder / "fuzz_judge.py").write_text(COUNTING_JUDGE)


def outcome(recipe: dict[str, Any]) -> tuple[str, str]:
    """(trained, refused, no update or FAULT; why) of one recipe, in the working directory."""
    from opd.commands.check import check_recipe
    from opd.errors import OPDError, TrainingError
    from opd.recipe.load import parse_recipe
    from opd.runs.stages import run_recipe
    from opd.stage.progress import Progress

    try:
        parsed = parse_recipe(recipe)
        check_recipe(parsed)
    except OPDError as error:
        return "refused", str(error)
    except Exception:
        return "FAULT", f"check: {traceback.format_exc()}"
    try:
        run = run_recipe(parsed, progress=Progress(quiet=True))
    except TrainingError as error:
        filtered = "made no update" in str(error)
        return ("no update" if filtered else "FAULT"), f"train: {error}"
    except Exception:
        return "FAULT", f"train: {traceback.format_exc()}"
    steps = [row["step"] for row in run.metrics if "train/loss" in row]
    return ("trained", "") if steps == [1, 2] else ("FAULT", f"train: steps {steps} instead of [1, 2]")


def one(seed: int, number: int) -> tuple[dict[str, Any], str, str]:
    """(recipe number `number` of a seed, its outcome, why)"""
    recipe = drawn(random.Random(f"{seed}-{number}"))
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        before = Path.cwd()
        os.chdir(folder)
        try:
            return recipe, *outcome(recipe)
        finally:
            os.chdir(before)
            sys.modules.pop("fuzz_judge", None)  # its file goes with the folder


def start_of(why: str) -> str:
    """A refusal without its numbers and names, to count it."""
    return " ".join(why.partition(". ")[0].replace("\n", " ").split())[:110]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=300, help="recipes that the check accepts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="SEED-NUMBER of one recipe")
    given = parser.parse_args()
    from opd.stage.quiet import quiet_libraries

    quiet_libraries()
    if given.only:
        import yaml

        seed, number = map(int, given.only.split("-"))
        recipe, ended, why = one(seed, number)
        print(yaml.safe_dump(recipe, sort_keys=False), ended, why, sep="\n")
        return int(ended == "FAULT")
    counts: Counter[str] = Counter()
    by_method: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    started, number = time.monotonic(), 0
    while counts["trained"] + counts["no update"] + counts["FAULT"] < given.recipes:
        recipe, ended, why = one(given.seed, number)
        counts[ended] += 1
        by_method[recipe["stages"][0]["method"]] += ended == "trained"
        refusals[start_of(why)] += ended == "refused"
        if ended == "FAULT":
            print(f"FAULT of {given.seed}-{number}: {why.strip().splitlines()[-1]}", flush=True)
        number += 1
    print(f"{number} recipes in {time.monotonic() - started:.0f} s: {dict(counts)}")
    print("trained:", ", ".join(f"{name} {count}" for name, count in sorted(by_method.items())))
    for why, count in refusals.most_common():
        if count:
            print(f"{count:5} x {why}")
    return int(counts["FAULT"] > 0)


if __name__ == "__main__":
    sys.exit(main())
