"""What student and teacher read, as rendered, for one example of each task, and the tokens that end a response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.errors import OPDError
from opd.method import Method
from opd.models.endings import Endings
from opd.models.language_model import LanguageModel
from opd.models.references import reference_of
from opd.models.render import render
from opd.models.shown import end_texts, text_of_ids
from opd.pieces.needs import Input, Trait, needs_of
from opd.recipe.schema import StageSpec, TaskSection
from opd.types import Prompt, Rollout, Unwritten, teachers_in

if TYPE_CHECKING:
    from opd.runs.prepare import Prepared

KEPT = 60  # tokens at each end of a long text that are shown
AT_START = 6  # lines at the start of a stage
PART = "\ufffd"  # a token at the cut may be a part of a character
RESPONSE = "[the response]"  # in place of a response that is not written yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model's tokenizer, the options of its chat template, and what ends its responses."""

    tokenizer: Any
    options: Mapping[str, Any]
    endings: Endings

    @classmethod
    def of(cls, lm: LanguageModel) -> Reader:
        """That of a loaded model."""
        return cls(tokenizer=lm.tokenizer, options=lm.template_options, endings=lm.endings)

    @property
    def ends(self) -> str:
        """The tokens that end a response, with their ids."""
        return end_texts(self.endings.stops, self.tokenizer)

    def read(self, prompt: Prompt) -> list[int]:
        """The ids that the model reads before it writes or scores a response."""
        return render(prompt, self.tokenizer, self.options)


def start_lines(spec: StageSpec, prepared: Prepared, models: Mapping[str, LanguageModel]) -> list[str]:
    """The first lines of `example_lines`, for the start of a stage; `models` are its student and teachers."""
    lines = example_lines(spec, prepared, {name: Reader.of(lm) for name, lm in models.items()})
    more = len(lines) - AT_START
    return lines if more <= 0 else [*lines[:AT_START], f"{more} more lines like these: `opd check` prints all"]


def example_lines(spec: StageSpec, prepared: Prepared, readers: Mapping[str, Reader]) -> list[str]:
    """Lines on the first prompt of each task. `readers`: by name, the models whose tokenizer is known.

    Raises the errors of `render` and of a context that depends on no response.
    """
    trained: list[str] = []
    held_out: list[str] = []
    ends: dict[str, list[str]] = {}
    for name, part in spec.by_task.items():
        label = "" if name is None else f"task {name}: "
        trained += [label + line for line in _training_lines(spec, prepared, name, part, readers)]
        held_out += [label + line for line in _held_out_lines(spec, prepared, name, part, readers)]
        for line in _end_lines(spec, prepared.method, part, readers):
            ends.setdefault(line, []).append(label)
    for line, labels in ends.items():
        trained += [line] if len(labels) == len(spec.by_task) else [label + line for label in labels]
    return [*trained, *held_out]


def _training_lines(
    spec: StageSpec, prepared: Prepared, name: str | None, part: TaskSection, readers: Mapping[str, Reader]
) -> Iterator[str]:
    method, student, prompt = prepared.method, readers.get(spec.train), prepared.tasks[name].prompts[0]
    if student is not None:
        yield f"the student reads {shown(student.read(prompt), student)}"
        if "response" in needs_of(method.source).columns and (prompt.response or prompt.turns):
            found = reference_of(prompt, student.tokenizer, student.endings, student.options)
            own = f", of which {sum(found.own)} are the assistant's and trained" if prompt.turns else ""
            yield f"a response of the data is {shown(found.ids, student)}{own}"
    for teacher in teachers_in(_teacher_of(spec, part, method)):
        yield from _teacher_lines(teacher, spec, method, prompt, readers, "")


def _held_out_lines(
    spec: StageSpec, prepared: Prepared, name: str | None, part: TaskSection, readers: Mapping[str, Reader]
) -> Iterator[str]:
    method, student, held_out = prepared.method, readers.get(spec.train), prepared.tasks[name].held_out
    if held_out is None or part.evaluate is None:
        return
    prompt, of = held_out.prompts[0], "of the held-out prompts, "
    if student is not None:
        yield f"{of}the student reads {shown(student.read(prompt), student)}"
    scorer = part.teacher if method.teacher.kind == "none" else _teacher_of(spec, part, method)
    if part.evaluate.teacher or part.evaluate.kl:
        for name in teachers_in(scorer):
            yield from _teacher_lines(name, spec, method, prompt, readers, of)


def _teacher_of(spec: StageSpec, part: TaskSection, method: Method) -> str | None:
    """The model that scores the task's responses, or that writes them without scoring; None if there is none."""
    if method.teacher.kind in ("external", "peer"):
        return part.teacher
    if method.teacher.kind != "none":
        return spec.train
    return part.teacher if Input.TEACHER_MODEL in needs_of(method.source) else None


def _teacher_lines(
    name: str, spec: StageSpec, method: Method, prompt: Prompt, readers: Mapping[str, Reader], of: str
) -> Iterator[str]:
    several = any(name in names for names in _panels(spec))
    who = f"{of}the student as its teacher" if name == spec.train else f"{of}the teacher{f' {name}' if several else ''}"
    reader, student = readers.get(name), readers.get(spec.train)
    if reader is None:  # a function or class of the user; or a line says that the tokenizer is not there yet
        return
    needs = needs_of(method.context)
    if Input.GROUP in needs:
        yield f"{who} reads a text that depends on the responses: see `teacher_reads` in the samples"
        return
    depends = needs.undeclared or Trait.READS_ATTEMPT in needs or Input.REWARD in needs
    try:
        (context,) = method.context([_unwritten(prompt)])
        ids = reader.read(context.views.get(name, context))
    except Exception as error:
        if isinstance(error, OPDError) and not depends:
            raise
        yield (
            f"{who} reads a text that depends on the response: see `teacher_reads` in the samples. With {RESPONSE} in "
            f"place of a response its context raises {type(error).__name__}: {error}"
        )
        return
    text = text_of_ids(ids, reader.tokenizer)
    own = None if student is None else student.read(prompt)
    if own is not None and student is not None and text == text_of_ids(own, student.tokenizer):
        yield f"{who} reads the same" + ("" if ids == own else f" text in {len(ids)} tokens")
        return
    with_placeholders = f", with {RESPONSE} in its place and a reward of 1" if depends else ""
    yield f"{who} reads{with_placeholders} {shown(ids, reader)}"


def _panels(spec: StageSpec) -> list[list[str]]:
    """The teachers of each task that has several for one row."""
    return [names for part in spec.by_task.values() if len(names := teachers_in(part.teacher)) > 1]


def _end_lines(spec: StageSpec, method: Method, part: TaskSection, readers: Mapping[str, Reader]) -> Iterator[str]:
    student, teacher = readers.get(spec.train), readers.get(part.teacher or spec.train)
    stops = "".join(f", or with the text {stop!r}" for stop in part.sampling.stop)
    ends = None if student is None else student.ends
    if ends is not None and spec.sampler is None:
        yield f"a response ends with {ends}{stops}"
    elif ends is not None:
        yield f"the sampler {spec.sampler} ends a response in training; in evaluations it ends with {ends}"
    writes = Input.TEACHER_MODEL in needs_of(method.source) or (part.evaluate is not None and part.evaluate.teacher)
    if writes and teacher is not None and teacher.ends != ends:
        yield f"a response that the teacher writes ends with {teacher.ends}"


def shown(ids: Sequence[int], reader: Reader) -> str:
    """The number of tokens and their text as a Python string, without the middle of a long one."""
    text = f"({len(ids)} token{'' if len(ids) == 1 else 's'}): "
    left_out = len(ids) - 2 * KEPT
    if left_out <= 0:
        return text + repr(text_of_ids(ids, reader.tokenizer))
    first, last = (text_of_ids(part, reader.tokenizer) for part in (ids[:KEPT], ids[-KEPT:]))
    first, last = first.rstrip(PART), last.lstrip(PART)
    return f"{text}{first!r} ... {left_out} tokens left out ... {last!r}"


def _unwritten(prompt: Prompt) -> Rollout:
    """A rollout with placeholders for the response and its reward."""
    return Unwritten(prompt=prompt, sample=0, prompt_ids=(), finished=True, text=RESPONSE, reward=1.0)
