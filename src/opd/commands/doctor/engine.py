"""Which sampler is faster for a stage with an engine: its servers, or this process. The servers get the weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from opd.commands.doctor.findings import Finding, skipped
from opd.commands.doctor.subject import Subject
from opd.environments.conversations import in_conversations
from opd.errors import ConfigError, TrainingError
from opd.parallel import ALONE
from opd.runs.launched import Starter
from opd.runs.prepare import sampling_of
from opd.runs.served import engine_samplers
from opd.stage.folder import StageDir
from opd.stage.progress import Progress
from opd.types import Prompt, ReservedStep, Sampler

REPEATS = 2  # of each side, in turns; the shorter time counts
EQUAL = 0.9  # an engine that is slower by less is not advised against


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A step's responses: their tokens, and the seconds that they took."""

    tokens: int
    seconds: float


def engine(subject: Subject) -> list[Finding]:
    """Seconds of one step's responses on both sides, per token, with the update of the engine's weights; if it has one.

    A first call of each, with one prompt, is not counted.
    """
    if subject.spec.engine is None:
        return []
    try:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
            place = StageDir(Path(folder))
            starter = Starter(folder=place, servers=servers, progress=Progress(quiet=True), world=ALONE)
            spec = starter.engine(subject.spec, subject.student)
            assert spec.engine is not None
            (inner,) = engine_samplers(spec, spec.engine, subject.student, place.path).values()
            sampling = sampling_of(spec.sampling)
            there = in_conversations(inner, subject.student, sampling, subject.rules, spec.max_prompt_length)
            there.sync(0)
            started = time.perf_counter()
            there.sync(0)
            update = time.perf_counter() - started
            here = subject.sampler(sampling)
            far, near = in_turns([there, here], subject.step_prompts, subject.seed)
    except (ConfigError, TrainingError) as error:
        return [skipped("cost/engine", f"The engine could not be used: {error}")]
    return [advice(subject, far, near, update)]


def in_turns(samplers: Sequence[Sampler], prompts: Sequence[Prompt], seed: int) -> list[Written]:
    """The shortest of `REPEATS` times of each sampler, which take turns. Each repetition draws other responses."""
    best: list[Written | None] = [None] * len(samplers)
    for sampler in samplers:
        sampler(prompts[:1], seed=(seed, ReservedStep.DOCTOR))
    for repeat in range(REPEATS):
        for i, sampler in enumerate(samplers):
            started = time.perf_counter()
            rollouts = sampler(prompts, seed=(seed + 1 + repeat, ReservedStep.DOCTOR))
            seconds = time.perf_counter() - started
            found = Written(tokens=sum(len(one.own_ids) for one in rollouts), seconds=seconds)
            old = best[i]
            if old is None or found.seconds * old.tokens < old.seconds * found.tokens:
                best[i] = found
    return [one for one in best if one is not None]


def advice(subject: Subject, far: Written, near: Written, update: float) -> Finding:
    """The finding: how much faster a step's responses are from the engine than from this process."""
    spec = subject.spec
    own = near.seconds / near.tokens * far.tokens  # of as many tokens as the engine wrote
    ratio = own / (far.seconds + update)
    numbers = {
        "engine_s": far.seconds,
        "engine_update_s": update,
        "process_s": own,
        "tokens": far.tokens,
        "ratio": ratio,
    }
    says = (
        f"The engine writes {far.tokens} tokens, the responses to {len(subject.step_prompts)} prompts, in "
        f"{far.seconds:.2f} s, and an update of its weights takes {update:.2f} s. This process writes as many in "
        f"{own:.2f} s: {ratio:.2f} times the engine's time."
    )
    if ratio >= EQUAL:
        return Finding(name="cost/engine", level="ok", says=says, numbers=numbers)
    return Finding(
        name="cost/engine",
        level="change",
        says=f"{says} The engine is slower.",
        numbers=numbers,
        remedy=f"Remove the engine: stages.{spec.name}.engine=null. Or raise prompts_per_step or sampling.n: an engine "
        "gains by larger batches.",
        study="docs/performance.md: Generation",
    )
