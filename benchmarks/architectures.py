"""Measure every decoder architecture of the installed transformers, and write docs/architectures.md.

python benchmarks/architectures.py                 all of them, and the page
python benchmarks/architectures.py llama mamba2    only these, printed
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from common import HERE

sys.path.insert(0, str(HERE.parent / "tests"))
PAGE = HERE.parent / "docs" / "architectures.md"
FAST = "cache, padding, shared prefixes"
INTRODUCTION = """# Architectures

Written by `python benchmarks/architectures.py` with transformers {transformers} and torch {torch}. Every decoder config
of `AutoModelForCausalLM` is shrunk to under 2M parameters, with one layer of each kind that its default names, random
weights and windows shorter than the rows. Student and teacher train two steps of `reverse_kl` in float32. Each number
is the largest difference from plain forwards of one row at a time, without padding, mask or cache:

| column | difference |
|---|---|
| sampler | log-probs recorded while sampling, in nats |
| teacher | log-probs of a batch of responses, in nats |
| gradient | norm of the difference from autograd, relative to the gradient's norm |
| saved | log-probs of the saved folder, loaded by transformers, in nats |

When a model is wrapped, a probe reads three rows in each way that sampling, scoring and training use, and compares
the log-probs with those of each row alone (`opd.models.probe`). A way that differs is not used. The column *reading*
says what is left out, or what is used instead:

- `equal lengths`: rows of one length are sampled together, because padding at the beginning changes the states
- `no shared prefixes`: each row is read as a whole in scoring and training. The cache of recurrent layers is a state
  that every token overwrites, so no gradient flows through it
- `no cache`: sampling reads the whole row again at every token. It is exact, and slow for long responses
- `trains in eval()`: the layers compute something else in train(), such as routers with noise
- `row by row`: a row's states depend on its batch

Some limits of length follow from the config (`positions_of`): dynamic scaling and LongRoPE use other frequencies for a
whole batch once a row is long, and where an index selects the tokens to attend to (DeepSeek V3.2, GLM-5, MiniMax M3,
Doge) ties and rounding decide what it selects. Rows end before that.

In float32 a difference of up to 1e-4 nats, and what the size of the logits adds to it, counts as rounding; where one
rounding of the embeddings moves the log-probs by much, up to ten times that.

{counts}

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    model_type: str
    verdict: str  # exact, rounding, wrong, refused, left out
    architecture: str = ""
    layers: str = ""
    reading: str = ""
    numbers: tuple[float, ...] = ()
    recurrent: bool = False
    why: str = ""


def measured(model_type: str) -> Row:
    from support.architectures import small_model
    from support.exactness import exactness

    from opd.errors import OPDError
    from opd.models import wrapping
    from opd.models.new import character_tokenizer

    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456")
    try:
        models = [small_model(model_type, seed=seed) for seed in (0, 1)]
    except Exception as error:  # a config that these numbers do not fit may raise anything
        return Row(model_type=model_type, verdict="left out", why=first_line(error))
    name, layers = type(models[0]).__name__, kinds(models[0].config)
    try:
        student, teacher = (wrapping.wrap(model, tokenizer, name=model_type) for model in models)
        found = exactness(student, teacher)
    except OPDError as error:
        return Row(model_type=model_type, verdict="refused", architecture=name, layers=layers, why=first_line(error))
    numbers = (found.sampler, found.teacher, found.gradient, found.saved)
    rounding = max(found.sampler, found.teacher, found.saved) <= 1e-4 and found.gradient <= 1e-4
    return Row(
        model_type=model_type,
        verdict="exact" if found.exact else "rounding" if rounding else "wrong",
        architecture=name,
        layers=layers,
        reading=reading_of(student.reading),
        recurrent=student.reading.recurrent or bool(getattr(models[0], "_is_stateful", False)),
        numbers=numbers,
    )


def kinds(config: Any) -> str:
    found = getattr(config.get_text_config(), "layer_types", None) or ()
    return ", ".join(dict.fromkeys(found))


def reading_of(reading: Any) -> str:
    said = [
        ("row by row", not reading.together),
        ("no cache", not reading.cache),
        ("equal lengths", reading.cache and not reading.padding),
        ("no shared prefixes", reading.cache and reading.padding and not reading.shares),
        ("trains in eval()", not reading.training),
    ]
    return ", ".join(text for text, holds in said if holds)


def first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}".replace("|", "\\|")


def page(rows: list[Row]) -> str:
    import torch
    import transformers

    tried = [row for row in rows if row.numbers]
    count = Counter(row.verdict for row in rows)
    recurrent = sum(row.verdict == "exact" and row.recurrent for row in tried)
    said = (
        f"{len(tried)} architectures train: {count['exact']} are exact (log-probs within 1e-5, gradients within 1e-4), "
        f"{recurrent} of them with recurrent layers; {count['rounding']} differ by more than that and by at most 1e-4 "
        f"nats; {count['wrong']} are wrong. {count['refused']} are refused by name, {count['left out']} have no small "
        "config here."
    )
    lines = [
        INTRODUCTION.format(transformers=transformers.__version__, torch=torch.__version__, counts=said).rstrip(),
        "",
    ]
    lines += [
        "| type | class | kinds of layers | reading | sampler | teacher | gradient | saved | |",
        "|---|---|---|---|--:|--:|--:|--:|---|",
    ]
    for row in tried:
        cells = " | ".join(f"{number:.0e}" if number else "0" for number in row.numbers)
        lines.append(
            f"| `{row.model_type}` | {row.architecture} | {row.layers} | {row.reading} | {cells} | {row.verdict} |"
        )
    for verdict, title in (("refused", "Refused"), ("left out", "Without a small config")):
        lines += ["", f"## {title}", "", "| type | reason |", "|---|---|"]
        lines += [f"| `{row.model_type}` | {row.why} |" for row in rows if row.verdict == verdict]
    return "\n".join(lines) + "\n"


def main() -> None:
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny matrices
    from support.architectures import decoder_types

    names = sys.argv[1:]
    rows: list[Row] = []
    for model_type in names or decoder_types():
        start = time.perf_counter()
        rows.append(row := measured(model_type))
        numbers = " ".join(f"{number:.1e}" for number in row.numbers)
        print(
            f"{row.verdict:9}{model_type:28}{numbers} {row.reading or row.why} {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    if not names:
        PAGE.write_text(page(rows))
        print(PAGE)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
