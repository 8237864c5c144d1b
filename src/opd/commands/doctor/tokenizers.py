"""Do student and teacher use the same tokens? Compares tokenizers, templates and endings; needs no weights.

arXiv 2603.25562 section 4.3 found two special tokens that carried most of a run's signal: `<think>`, split differently
by the teacher's tokenizer (log-prob -0.07 by the student, -19.16 by the teacher), and `<|im_end|>` (0.00 and -58.71).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.commands.doctor.findings import Finding, skipped
from opd.errors import AlignmentError
from opd.models.endings import endings_of, turn_end
from opd.models.forward import common_prefix
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.models.vocabularies import check_same_tokens
from opd.types import Prompt

THINK = ("<think>", "</think>")


SPECIAL_TOKENS = (
    "`opd study special_tokens`; arXiv 2603.25562 section 4.3: special tokens that the teacher does not use gave -19 "
    "and -58 nats"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model without its weights: name in the recipe, tokenizer, template options, and stop ids."""

    name: str
    tokenizer: Any
    options: Mapping[str, Any]
    stops: frozenset[int]

    @classmethod
    def of(cls, lm: LanguageModel, name: str) -> Side:
        return cls(name=name, tokenizer=lm.tokenizer, options=lm.template_options, stops=lm.stop_ids)


def same_map(student: Any, teacher: Any, names: tuple[str, str]) -> Finding:
    """Whether both tokenizers give every token the same id, without which positions cannot be compared."""
    try:
        common = check_same_tokens(student, teacher, names)
    except AlignmentError as error:
        return Finding(
            name="tokens/map",
            level="stop",
            says=str(error),
            numbers={"student_tokens": len(student.get_vocab()), "teacher_tokens": len(teacher.get_vocab())},
            remedy=f"Set models.{names[1]}.path to a teacher with the student's tokenizer.",
            study=SPECIAL_TOKENS,
        )
    count, differences = len(student.get_vocab()), common.differences(names)
    says = f"Student and teacher give all {count} tokens the same ids."
    if differences:
        says = f"Student and teacher give {common.size} ids to the same tokens. {'. '.join(differences)}."
    return Finding(
        name="tokens/map",
        level="ok",
        says=says,
        numbers={"student_tokens": count, "teacher_tokens": len(teacher.get_vocab())},
    )


def head_widths(vocabulary: int, student_rows: int, teacher_rows: int) -> Finding:
    """Numbers of rows of both output layers. Rows after the tokenizer's last id are padding: never sampled or scored.

    Loading refuses a layer with fewer rows than the tokenizer has ids.
    """
    return Finding(
        name="tokens/head_widths",
        level="ok",
        says=f"Output layers of {student_rows} and {teacher_rows} rows for {vocabulary} tokens; further rows are "
        "left out of every softmax.",
        numbers={"vocabulary": vocabulary, "student_rows": student_rows, "teacher_rows": teacher_rows},
    )


def templates(student: Side, teacher: Side, prompts: Sequence[Prompt]) -> Finding:
    """Whether both models read the same ids for the same prompt, apart from what the method's context adds."""
    different: list[tuple[Prompt, list[int], list[int]]] = []
    for prompt in prompts:
        ours = render(prompt, student.tokenizer, student.options)
        theirs = render(prompt, teacher.tokenizer, teacher.options)
        if ours != theirs:
            different.append((prompt, ours, theirs))
    numbers: dict[str, Any] = {"prompts": len(prompts), "different": len(different)}
    if not different:
        return Finding(
            name="tokens/template",
            level="ok",
            says=f"Both models read the same ids for the same prompt, in {len(prompts)} of {len(prompts)} prompts.",
            numbers=numbers,
        )
    prompt, ours, theirs = different[0]
    at = len(common_prefix(tuple(ours), tuple(theirs)))
    shown = [side.tokenizer.decode(ids[at : at + 12]) for side, ids in ((student, ours), (teacher, theirs))]
    return Finding(
        name="tokens/template",
        level="change",
        says=f"{len(different)} of {len(prompts)} prompts are rendered differently for the teacher: prompt {prompt.id} "
        f"differs from token {at} on, {shown[0]!r} for the student and {shown[1]!r} for the teacher.",
        numbers={**numbers, "first_prompt": prompt.id, "first_token": at},
        remedy=f"Set models.{student.name}.chat_template (and template_options) to those of {teacher.name}, or "
        f"models.{teacher.name}.chat_template to the student's.",
        study="`opd study prompts`; arXiv 2604.13016 section 5.2: the teacher's template for both closes about 85 % of "
        "the gap instead of 80 %",
    )


def thinking(student: Side, teacher: Side, prompts: Sequence[Prompt]) -> Finding:
    """Whether both templates leave the model in the same state: outside, inside or after (`behind`) a think block."""
    prompt = next((p for p in prompts if not isinstance(p.content, str)), None)
    if prompt is None:
        return skipped("tokens/thinking", "Prompts are plain text: no template opens a think block.")
    states = [
        think_state(side.tokenizer.decode(render(prompt, side.tokenizer, side.options))) for side in (student, teacher)
    ]
    enabled = [side.options.get("enable_thinking") for side in (student, teacher)]
    numbers = {"student": states[0], "teacher": states[1]}
    if states[0] == states[1]:
        return Finding(
            name="tokens/thinking",
            level="ok",
            says=f"Both models begin to write {states[0]} a think block.",
            numbers=numbers,
        )
    return Finding(
        name="tokens/thinking",
        level="change",
        says=f"The student begins to write {states[0]} a think block (enable_thinking: {enabled[0]}), the teacher "
        f"{states[1]} one (enable_thinking: {enabled[1]}): the first tokens differ systematically.",
        numbers=numbers,
        remedy=f"Set models.{student.name}.template_options and models.{teacher.name}.template_options to the same "
        "enable_thinking.",
        study="arXiv 2605.11182 app. A.14: a student without, a teacher with thinking learns malformed think tags",
    )


def think_state(rendered: str) -> str:
    """The model's state after a rendered prompt: `outside`, `inside` or `behind` (after) a think block."""
    begins, ends = rendered.rfind(THINK[0]), rendered.rfind(THINK[1])
    if begins < 0 and ends < 0:
        return "outside"
    return "inside" if begins > ends else "behind"


def endings(student: Side, teacher: Side, *, chat: bool) -> Finding:
    """Whether the teacher's end token also ends the student's responses, and vice versa."""
    theirs = turn_end(teacher.tokenizer, teacher.options) if chat else teacher.tokenizer.eos_token_id
    if theirs is None:
        return skipped(
            "tokens/endings", f"The template of {teacher.name} ends an assistant's message with no token of its own."
        )
    ours = endings_of(student.tokenizer, student.options)
    end, own = ours.turn if chat else ours.text, teacher.tokenizer.decode([theirs])
    known = teacher.stops | {theirs}
    numbers = {"student_stop_ids": sorted(student.stops), "teacher_end_id": theirs, "teacher_stop_ids": sorted(known)}
    if theirs in student.stops and (end in known or end is None):
        return Finding(
            name="tokens/endings",
            level="ok",
            says=f"The teacher ends its turn with {own!r}, which ends the student's response too.",
            numbers=numbers,
        )
    parts: list[str] = []
    if theirs not in student.stops:
        parts.append(f"The teacher ends its turn with {own!r}, and the student's response continues after it")
    if end is not None and end not in known:
        parts.append(
            f"The student ends its response with {student.tokenizer.decode([end])!r}, which does not end the teacher's"
        )
    return Finding(
        name="tokens/endings",
        level="change",
        says=". ".join(parts) + ".",
        numbers=numbers,
        remedy=f"Set sampling.stop to [{own!r}], or give both models one ending: models.{student.name}.chat_template "
        "and the eos_token of both tokenizers.",
        study=SPECIAL_TOKENS,
    )


def paired_endings(student: Side, teacher: Side, ends: Mapping[int, int]) -> Finding:
    """With two tokenizers: the teacher's end token for each of the student's, from `TokenizerPair.ends`."""
    read = [f"{student.tokenizer.decode([end])!r} as {teacher.tokenizer.decode([its])!r}" for end, its in ends.items()]
    numbers = {"ends": {str(end): its for end, its in ends.items()}, "student_stop_ids": sorted(student.stops)}
    if student.stops & ends.keys():
        return Finding(
            name="tokens/endings",
            level="ok",
            says=f"The teacher reads the end of the student's responses as its own: {', '.join(read)}.",
            numbers=numbers,
        )
    return Finding(
        name="tokens/endings",
        level="change",
        says="No end token of the student has a counterpart among the teacher's end tokens: where to stop is not "
        "compared, and not learned.",
        numbers=numbers,
        remedy=f"Set the eos_token of both tokenizers, or models.{student.name}.chat_template and "
        f"models.{teacher.name}.chat_template to ones that end a turn with a special token.",
        study=SPECIAL_TOKENS,
    )


def splits(student: Side, teacher: Side, responses: Sequence[str]) -> Finding:
    """Whether both tokenizers split the student's responses and all markers into the same ids."""
    known = {
        t for side in (student, teacher) for t in (*side.tokenizer.all_special_tokens, *added_tokens(side.tokenizer))
    }
    markers = sorted(known | set(THINK))
    split_markers = [text for text in markers if _ids(student, text) != _ids(teacher, text)]
    split_responses = [text for text in responses if _ids(student, text) != _ids(teacher, text)]
    numbers = {
        "markers": len(markers),
        "markers_cut_otherwise": split_markers,
        "responses": len(responses),
        "responses_cut_otherwise": len(split_responses),
    }
    if not split_markers and not split_responses:
        return Finding(
            name="tokens/splits",
            level="ok",
            says=f"Both tokenizers split {len(responses)} responses and {len(markers)} markers into the same ids.",
            numbers=numbers,
        )
    example = ""
    if split_markers:
        first = split_markers[0]
        pieces = [side.tokenizer.convert_ids_to_tokens(_ids(side, first)) for side in (student, teacher)]
        example = f" {first!r} is {pieces[0]} for the student and {pieces[1]} for the teacher."
    return Finding(
        name="tokens/splits",
        level="change",
        says=f"The tokenizers split {len(split_markers)} of {len(markers)} markers and {len(split_responses)} of "
        f"{len(responses)} responses into different ids.{example}",
        numbers=numbers,
        remedy=f"Give models.{student.name} and models.{teacher.name} the same tokenizer files"
        + (f", or use local_support_matching with options.mask_tokens: {split_markers}." if split_markers else "."),
        study=f"{SPECIAL_TOKENS}; masking them: 36.4 -> 40.7 points (Table 1)",
    )


def added_tokens(tokenizer: Any) -> list[str]:
    """Tokens added to a tokenizer's base vocabulary: chat markers, think tags."""
    return [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of all special and added tokens."""
    return frozenset({*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})})


def _ids(side: Side, text: str) -> list[int]:
    return side.tokenizer(text, add_special_tokens=False).input_ids
