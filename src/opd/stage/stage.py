"""One stage while it trains: models, pieces and files of the loop; and when to save, evaluate and stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opd.data.order import PromptOrder
from opd.errors import RunError, TrainingError
from opd.evaluation import diagnostics
from opd.files import GIB
from opd.loss.step import PhaseA
from opd.maths.metrics import Metrics, merged
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.models.root import Root
from opd.parallel import World
from opd.pieces.needs import Input, Trait
from opd.recipe.schema import StageSpec
from opd.rewards.base import StageRewards
from opd.samplers.ahead import Ahead
from opd.stage import drawn_ahead
from opd.stage.exams import BEFORE, Exams, when_after
from opd.stage.folder import StageDir
from opd.stage.follow import Followed, rows_of_followed
from opd.stage.interrupt import Interrupt, StopNow, stopped_after
from opd.stage.looks import Looks, looks_at
from opd.stage.optimisation import StageOptimisation
from opd.stage.pace import Pace
from opd.stage.progress import Progress
from opd.stage.resume import Trained
from opd.stage.samples import rows_of
from opd.stage.stopwatch import Stopwatch, peak_bytes
from opd.stage.trackers import ReportWriter
from opd.teachers.seen import why_unseen
from opd.types import Memory, Prompt, ScoreRequest, Teacher, Writers


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`seconds`: training time without evaluations and comparisons. `stop`: the signal of the last step, or 0."""

    seconds: float
    stop: int


@dataclass(slots=True, kw_only=True)
class Stage:
    """Everything that a stage needs, built by `opd.runs.build`, and its state."""

    # models and rewards
    student: LanguageModel
    root: Root  # the student's module that runs forward and backward
    teacher: Teacher
    readers: Mapping[str | None, LanguageModel]  # the models that read the contexts, by `Prompt.teacher_id`
    writers: Writers
    reward: StageRewards
    # method and data
    spec: StageSpec
    method: Method
    memory: Mapping[str, Memory]  # of the method in this run, by name
    order: PromptOrder
    seed: int
    # execution
    world: World
    optimisation: StageOptimisation
    exams: Exams | None
    followed: Sequence[Followed] = ()  # held-out prompts in every sample file
    seconds_limit: float = math.inf
    router_aux_loss: float = 0.0  # the factor of the load-balancing loss
    ahead: Ahead | None = None  # the student's sampler, if it draws the next step's responses while a step trains
    peers: Sequence[Stage] = ()  # of the other models that this one trains; it steps, saves and stops for them
    # outputs
    folder: StageDir
    progress: Progress
    trackers: ReportWriter
    interrupt: Interrupt
    # state
    seconds: float = field(default=0.0, init=False)  # of training so far, maximum over processes
    finished: bool = field(default=False, init=False)  # after the last step, the time limit or the goal
    pace: Pace = field(init=False)
    stop: int = field(default=0, init=False)  # the signal that requests a stop
    looks: Looks = field(default_factory=Looks, init=False)  # of the step, for its sample file
    begun: bool = field(default=False, init=False)  # the first step of this start, or an evaluation before it
    saved: int | None = field(default=None, init=False)  # updates at the last checkpoint
    saved_at: float = field(default_factory=time.monotonic, init=False)
    # Updates so far, and what the method remembered then; None while the weights change and are logged.
    whole: tuple[int, dict[str, Any]] | None = field(default=None, init=False)

    @property
    def models(self) -> tuple[Stage, ...]:
        """This stage, and those of its other models. All compute a step's gradient before any is updated."""
        return (self, *self.peers)

    def __post_init__(self) -> None:
        self.pace = Pace(self.spec.steps, lambda done: self.exams is not None and self.exams.due(done))

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the remaining steps, from 0. After each: save, evaluate and stop when due.

        Continues from the last checkpoint. After a signal, saves and raises Stopped.
        """
        first = self._resume()
        self.begun = True
        for one in self.models:
            one._note_unseen()
            if one.exams is not None and first == 0:
                with self._all_whole():
                    one._measured(0, one.exams.before)
            one.whole = (first, one._remembered())
        with self.interrupt.after_step():
            for step in range(first, self.spec.steps):
                self.progress.phase(f"{self.spec.name}: step {step + 1} of {self.spec.steps}")
                for one in self.models:
                    one.pace.start()
                yield step
                done = step + 1  # updates so far
                for one in self.models:
                    one.whole = (done, one._remembered())
                stop, due = self._requests()
                if done % self.spec.checkpoint.every == 0 or self.finished or stop or due:
                    self._save(done)
                if self.finished or not stop:
                    self._examine(done)
                stop, _ = self._requests()
                if self.finished:
                    break
                if stop:  # the resumed run catches up on a skipped evaluation
                    self._save(done)
                    raise stopped_after(self.spec.name, done, self.spec.steps, stop)
        self.stop = self._requests()[0]

    @property
    def outcome(self) -> Outcome:
        """The outcome, once `steps` is exhausted."""
        return Outcome(seconds=self.seconds, stop=self.stop)

    def rescue(self) -> None:
        """After an error in a step: save the steps before it, if the weights and the method's memory are theirs.

        Nothing is waited for: responses that an engine has not given yet are not in the checkpoint.
        """
        if not self.begun:
            return
        last = self.saved or 0
        wholes = [one.whole for one in self.models]
        if any(whole is None for whole in wholes) or self.whole is None:
            what = f"{self.spec.name}: an error while the weights were changing"
            self.progress.note(f"{what}: the same command continues after step {last}")
            return
        done = self.whole[0]
        # With other processes, which wait in the middle of the step, neither the weights nor a checkpoint can be had.
        if self.world.size == 1 and done > (self.saved or 0) and self._finite():
            with suppress(RunError):  # the disk is full: the error that ended the step says more
                self._save(done, [whole[1] for whole in wholes if whole is not None], waits=False)
        last = self.saved or 0
        self.progress.note(
            f"{self.spec.name}: an error after {done} steps, of which {done - last} are lost: the same command "
            f"continues after step {last}"
        )

    # --- the parts of a step, in the order of the loop ---------------------------------------------------------------

    def sync(self, step: int) -> None:
        """Give the samplers the weights after `step` updates. Raises TrainingError if an engine does not serve them."""
        for one in self.models:
            one.writers.student.sync(step)

    def write_ahead(self, step: int) -> None:
        """Begin to write the responses of `step` with the weights of now, if the stage writes one step ahead."""
        if self.ahead is not None and step < self.spec.steps:
            self.ahead.begin(step, self.prompts(step))

    def prompts(self, step: int) -> list[Prompt]:
        """This process's prompts of the step."""
        step_prompts = self.order.take(step)
        return [step_prompts[i] for i in self._positions(step)]

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """A context with every model's whole weights in every process, for code that runs outside of `root`."""
        with ExitStack() as stack:
            for one in self.models:
                stack.enter_context(self.world.gathered(one.root))
            yield

    def _all_whole(self) -> AbstractContextManager[None]:
        """For an evaluation, which gathers its own model: the others too, because they may teach it."""
        return self.whole_weights() if self.peers else nullcontext()

    def request(self, step: int) -> ScoreRequest:
        """The scores that the teacher computes in this step."""
        return self.method.request(shown=self._shown(step))

    def compare(self, step: int, phase_a: PhaseA) -> Metrics:
        """Metrics compare/... of both models, before the update of every `diagnostics.every`-th step; else empty.

        Also keeps what the step's sample file shows of both models, if the step writes one.
        """
        spec = self.spec
        self.looks = self._looks(step, phase_a) if self._shown(step) else Looks()
        if not spec.diagnostics.every or step % spec.diagnostics.every:
            return Metrics()
        rollouts, contexts = phase_a.batch.rollouts, phase_a.contexts
        return diagnostics.compared(spec, self.method, self.student, self.teacher, rollouts, contexts)

    def _note_unseen(self) -> None:
        """Say of which teachers the sample files have no choices, and why."""
        spec = self.spec
        if not (spec.samples_every and spec.samples.rows) or self.method.teacher.kind == "none":
            return
        names = {prompt.teacher_id for prompts in self.order.prompts for prompt in prompts}
        for one in {id(teacher): teacher for teacher in map(self.teacher.of, sorted(names, key=str))}.values():
            if why := why_unseen(one, self.method.temperature):
                self.progress.note(f"{spec.name}: samples have no columns of the choices of {one.name}: {why}")

    def _looks(self, step: int, phase_a: PhaseA) -> Looks:
        """What the step's sample file shows besides the loss's numbers: with the weights that wrote the responses."""
        spec, how = self.spec, {"temperature": self.method.temperature}
        seed, samples = (self.seed, step), spec.samples
        rows: dict[int, dict[str, Any]] = {}
        if samples.rows:
            rows = looks_at(spec, self.method, self.student, self.teacher, phase_a, self.world, seed, self.progress)
        more = {**how, "micro_batch_tokens": spec.micro_batch_tokens, "world": self.world, "progress": self.progress}
        followed = rows_of_followed(self.followed, self.student, samples, step=step, **more)
        return Looks(rows=rows, followed=followed)

    def update(self, step: int, phase_a: PhaseA, loss: float, observed: Sequence[Metrics]) -> dict[str, float]:
        """Make the method's update with the accumulated gradient; returns all metrics of the step.

        Raises TrainingError, before the update, if the loss or the gradient is not finite.
        """
        metrics = diagnostics.step_metrics(phase_a.batch, self.method, step, buckets=diagnostics.buckets_of(self.spec))
        for more in (diagnostics.of_parts(self.method, phase_a), *observed):
            metrics.merge(more)
        grad_norm = self.optimisation.optimiser.clip()
        loss, metrics = self.world.sum(loss), merged(self.world.gather(metrics))
        self._check_finite(step, phase_a, loss, grad_norm)
        rates: Mapping[str, float] = {}
        self.whole = None
        if phase_a.trains:
            rates = self.method.update(self.optimisation)
            self.teacher.after_step()
        metrics.value("train/loss", loss)
        metrics.value("optim/grad_norm", grad_norm)
        if Trait.FILTERS in self.method.needs:
            metrics.value("train/update_skipped", float(not phase_a.trains))
        for name, value in {**phase_a.learned, **rates}.items():
            metrics.value(name, value)
        return metrics.reduce()

    def log(self, step: int, phase_a: PhaseA, metrics: Mapping[str, float], watch: Stopwatch) -> None:
        """Write metrics, timings and samples of a step to the folder, the trackers and the display."""
        done = step + 1
        self.seconds = self.world.max(self.seconds + watch.total - watch.laps["diagnose"])
        self.finished = done == self.spec.steps or self.seconds >= self.seconds_limit
        self.pace.stepped()
        lengths = [len(rollout.own_ids) for phase in phase_a.all for rollout in phase.batch.rollouts]
        tokens = self.world.sum(sum(lengths))
        self._write(done, metrics, rate=tokens / watch.total)
        peak = peak_bytes(self.student.device) / GIB
        counts = {"tokens": tokens, "tokens_per_second": tokens / watch.total, "peak_memory_gib": peak}
        counts["wall"] = time.time()
        self.folder.append_timings(done, watch.row({**counts, **self.reward.pop_requests(), **self._of_servers()}))
        if self._shown(step) or (self.spec.samples_every and self.finished):
            rows = self._sample_rows(step, phase_a)
            self.folder.write_samples(done, rows)
            self.trackers.table(self._name, done, rows)

    def _of_servers(self) -> dict[str, float]:
        """What servers did in this step, over all processes; empty if teacher and sampler are in this process."""
        counts = {f"teacher_{name}": value for name, value in self.teacher.pop_requests().items()}
        counts |= {f"engine_{name}": value for name, value in self.writers.student.pop_requests().items()}
        of_ranks = self.world.gather(counts)
        return {name: sum(one[name] for one in of_ranks) for name in of_ranks[0]}

    # --- around a step -----------------------------------------------------------------------------------------------

    @property
    def _trained(self) -> Trained:
        return Trained(
            student=self.student,
            teacher=self.teacher,
            optimisation=self.optimisation,
            memory=self.memory,
            peers=[one._trained for one in self.peers],
        )

    def _resume(self) -> int:
        """Restore the last checkpoint; returns the first step to make, 0 without a checkpoint."""
        saved = self._trained.restore(self.folder.checkpoints, self.world)
        if saved is None:
            for one in self.models:
                one.folder.rewind(-1)
                if one.exams is not None:
                    one.exams.kept.clear(*BEFORE)
            return 0
        self.seconds = float(saved.state["seconds"])
        self.finished = saved.step >= self.spec.steps or self.seconds >= self.seconds_limit
        self.saved = saved.step
        self.progress.note(f"{self.spec.name}: continuing after step {saved.step} of {self.spec.steps}")
        if self.ahead is not None and saved.step < self.spec.steps:
            positions = self._positions(saved.step)
            if not drawn_ahead.restore(self.ahead, saved.step, self.order.take(saved.step), positions, saved.state):
                self.progress.note(
                    f"{self.spec.name}: no server gave the responses of step {saved.step + 1} before the run ended. "
                    "They are written with the weights of that step, not one step ahead"
                )
        for one in self.models:
            one.folder.rewind(saved.step)
            rows = one.folder.read_metrics() if self.world.main else []
            measured = [
                row for row in rows if row["step"] == saved.step and any(key.startswith("eval/") for key in row)
            ]
            evaluated = self.world.any(bool(measured))
            if one.exams is not None:
                one.exams.kept.clear(*([] if evaluated else [when_after(saved.step)]))
                self.finished |= self.world.any(any(map(one.exams.reached, measured)))
            if not evaluated:  # the run was killed between the checkpoint and its evaluation
                self._examine(saved.step, [one])
        return self.spec.steps if self.finished else saved.step

    def _requests(self) -> tuple[int, bool]:
        """(the signal that requests a stop or 0, whether a checkpoint is due by the clock), for all processes."""
        minutes = (time.monotonic() - self.saved_at) / 60
        stop = int(self.world.max(self.interrupt.requested))
        return stop, self.world.any(minutes >= self.spec.checkpoint.every_minutes)

    def _remembered(self) -> dict[str, Any]:
        """A copy of the method's memory, which a step changes before its update."""
        return {name: deepcopy(one.state_dict()) for name, one in self.memory.items()}

    def _save(self, done: int, remembered: Sequence[Mapping[str, Any]] | None = None, *, waits: bool = True) -> None:
        """Write a checkpoint, if there is none of this step. The step's metrics are before it, its evaluation after.

        `remembered`: of each model; default: as it is now. `waits`: for the responses of the next step.
        """
        if self.saved == done:
            return
        more: Mapping[str, Any] = {}
        if self.ahead is not None:
            more = drawn_ahead.saved(self.ahead, done, self._positions(done), self.world, waits=waits)
        self._trained.save(
            self.folder.checkpoints,
            done,
            seconds=self.seconds,
            remembered=[one._remembered() for one in self.models] if remembered is None else remembered,
            keep=self.spec.checkpoint.keep,
            world=self.world,
            more=more,
        )
        self.saved, self.saved_at = done, time.monotonic()

    def _examine(self, done: int, models: Sequence[Stage] | None = None) -> None:
        """Evaluate when due; always at the end of the stage. A signal in it saves and stops at once, if it can.

        `models`: default: all.
        """
        due = [
            (one, one.exams)
            for one in (self.models if models is None else models)
            if one.exams is not None and (self.finished or one.exams.due(done))
        ]
        if not due:
            return
        measured: list[dict[str, float]] = []
        try:
            with self.interrupt.at_once():
                for one, exams in due:
                    with self._all_whole():
                        measured.append(one._measured(done, partial(exams.after, done, finished=self.finished)))
        except StopNow as now:
            self._save(done)
            raise stopped_after(self.spec.name, done, self.spec.steps, now.signal) from None
        if self.exams is not None and self.exams.goals:  # not of a stage with peers
            self._end_at_goal(done, self.exams, measured[0])

    def _end_at_goal(self, done: int, exams: Exams, measured: Mapping[str, float]) -> None:
        """End the stage, with a checkpoint, if an evaluation reaches the goals; note it, or that the last does not."""
        reached = self.world.any(exams.reached(measured))
        values = {name: measured.get(name, math.nan) for name in exams.goals}
        shown = ", ".join(f"{name} {value:.3g} of {exams.goals[name]:g}" for name, value in values.items())
        if reached and not self.finished:
            self.progress.note(f"{self.spec.name}: ends after step {done} of {self.spec.steps}, at its goal: {shown}")
            self.finished = True
            self._save(done)
        elif self.finished and not reached:
            self.progress.note(f"{self.spec.name}: its goal was not reached: {shown}")

    def _measured(self, done: int, exam: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Write the metrics of an evaluation after `done` updates, and return them."""
        assert self.exams is not None
        self.pace.start()
        measured = exam()
        if measured:
            self._write(done, measured)
        self.exams.kept.clear()
        self.pace.examined()
        return measured

    def _finite(self) -> bool:
        """Whether all trained weights are finite."""
        weights = [weight for one in self.models for weight in one.student.trainable().values()]
        return all(bool(weight.isfinite().all()) for weight in weights)

    def _write(self, done: int, metrics: Mapping[str, float], *, rate: float = 0.0) -> None:
        self.folder.append_metrics(done, metrics)
        self.trackers.log(self._name, done, metrics)
        if self._name == self.spec.name or any(key.startswith("eval/") for key in metrics):
            self.progress.step(self._name, done, metrics, rate=rate, left=self.pace.left(done))

    @property
    def _name(self) -> str:
        """The stage's name; of a peer, whose numbers are beside those of the stage's first model, with its own."""
        is_peer = self.spec.train in self.spec.peers
        return f"{self.spec.name}/{self.spec.train}" if is_peer else self.spec.name

    def _shown(self, step: int) -> bool:
        """Whether this step writes its responses to a sample file."""
        every = self.spec.samples_every
        return bool(every) and (step % every == 0 or step + 1 == self.spec.steps)

    def _positions(self, step: int) -> list[int]:
        """The positions of this process's prompts among the step's.

        If the method compares the responses of a group, a prompt that occurs twice in a step stays in one process.
        """
        groups = Input.GROUP in self.method.needs
        return self.world.positions([prompt.id if groups else i for i, prompt in enumerate(self.order.take(step))])

    def _sample_rows(self, step: int, phase_a: PhaseA) -> list[dict[str, Any]]:
        """The responses of all processes, as rows of a sample file: the method's own, then those of its parts."""
        tokenizer, extract = self.student.tokenizer, self.reward.extracted
        rows = [row for phase in phase_a.all for row in rows_of(phase, tokenizer, self.readers, extract)]
        for i, more in self.looks.rows.items():  # the method's own rows come first
            rows[i] |= more
        followed = list(self.looks.followed)
        if not self.method.parts:
            return self.world.in_order(self._positions(step), rows) + followed
        shared = [row for of_process in self.world.gather(rows) for row in of_process]
        place = {prompt.id: i for i, prompt in enumerate(self.order.take(step))}
        return sorted(shared, key=lambda row: (row["part"], place[row["prompt_id"]], row["sample"])) + followed

    def _check_finite(self, step: int, phase_a: PhaseA, loss: float, grad_norm: float) -> None:
        """Raise TrainingError if loss or gradient is not finite, before the update, while the weights are good."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        rows = self._sample_rows(step, phase_a)
        responses = self.folder.write_samples(step + 1, rows)
        raise TrainingError(
            f"Stage {self.spec.name!r}, step {step + 1}: loss {loss}, gradient norm {grad_norm}. The update was "
            f"skipped. Prompts of the step: {sorted({row['prompt_id'] for row in rows})}. "
            f"The step's responses: {responses}. "
            "Usual causes: too large a learning rate, bfloat16 weights, a teacher that returns NaN."
        )
