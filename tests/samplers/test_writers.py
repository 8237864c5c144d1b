"""How responses end that the student did not write: those of the data and of a teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import tiny
from support.pairs import byte_bpe, sentence_piece
from tokenizers import decoders

from opd.errors import ConfigError
from opd.models.language_model import LanguageModel
from opd.pieces.contexts import same_prompt
from opd.samplers.hf import TransformersSampler
from opd.samplers.writers import ReferenceWriter, TeacherWriter, ended_as_by, in_tokens_of
from opd.types import Prompt, Rollout, Sampling

TEXT = Prompt(id=0, content="hi", response="ab")
CHAT = replace(TEXT, content=({"role": "user", "content": "hi"},))
SPECIAL = ("<pad>", "<eos>", "<turn>", "<other>")


def speaking(end: str, *merges: str, special: tuple[str, ...] = SPECIAL) -> LanguageModel:
    """A model whose template ends a turn with `end`; its end of sequence is <eos>."""
    tokenizer = byte_bpe(*merges, special=special)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}" + end + "\n{% endfor %}"
    return tiny(tokenizer=tokenizer)


def saying(token: str, lm: LanguageModel) -> LanguageModel:
    """The model, changed to say this token alone."""
    head: Any = lm.model.get_output_embeddings()  # type: ignore[operator]
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    with torch.no_grad():
        head.weight.zero_()
        head.bias[lm.tokenizer.get_vocab()[token]] = 30.0
    return lm


def written(prompt: Prompt, text: str, ids: list[int], *, finished: bool = True) -> Rollout:
    n = len(ids)
    return Rollout(
        prompt=prompt,
        sample=0,
        prompt_ids=(5,),
        response_ids=torch.tensor(ids),
        trained=torch.ones(n, dtype=torch.bool),
        turn=torch.zeros(n, dtype=torch.long),
        finished=finished,
        text=text,
    )


def tokens(lm: LanguageModel, rollout: Rollout) -> list[str]:
    return lm.tokenizer.convert_ids_to_tokens(rollout.response_ids.tolist())


@pytest.mark.parametrize(("prompt", "end"), [(TEXT, "<eos>"), (CHAT, "<turn>")])
def test_reference_writer_ends_as_prompt_asks(prompt: Prompt, end: str):
    student = speaking("<turn>")
    (rollout,) = ReferenceWriter(student=student)([prompt], seed=(0, 0))
    assert tokens(student, rollout) == ["a", "b", end]


def test_reference_writer_ends_with_eos_when_model_lacks_turn_token():
    student = speaking("<turn>", special=SPECIAL)
    short = replace(student, vocabulary=student.tokenizer.get_vocab()["<turn>"])
    assert short.endings.turn == student.tokenizer.eos_token_id


@pytest.mark.parametrize(("prompt", "end"), [(TEXT, "<eos>"), (CHAT, "<turn>")])
def test_in_tokens_of_ends_as_prompt_asks(prompt: Prompt, end: str):
    student = speaking("<turn>", "a b")
    assert tokens(student, in_tokens_of(student, written(prompt, "abc", [9, 9]))) == ["ab", "c", end]
    assert tokens(student, in_tokens_of(student, written(prompt, "abc", [9], finished=False))) == ["ab", "c"]
    assert tokens(student, in_tokens_of(student, written(prompt, "", [9]))) == [end]


def test_in_tokens_of_refuses_tokenizer_without_eos():
    student = speaking("\n")
    student.tokenizer.eos_token = None
    for text in ("ab", ""):
        with pytest.raises(ConfigError, match="no end-of-sequence token, so no response can end"):
            in_tokens_of(student, written(CHAT, text, [9]))


def test_ended_as_by_replaces_end_that_is_not_students():
    student, teacher = speaking("<turn>"), speaking("<other>")
    turn, other, eos = (student.tokenizer.get_vocab()[name] for name in ("<turn>", "<other>", "<eos>"))
    assert other not in student.stop_ids
    assert tokens(student, ended_as_by(student, teacher, written(CHAT, "", [9, other])))[-1] == "<turn>"
    assert tokens(student, ended_as_by(student, teacher, written(TEXT, "", [9, other])))[-1] == "<eos>"
    for last in (turn, eos, 9):
        assert ended_as_by(student, teacher, written(CHAT, "", [8, last])).response_ids.tolist() == [8, last]


@pytest.mark.parametrize("end", ["<turn>", "<other>"])
def test_teacher_writer_ends_with_students_turn(end: str):
    """A teacher that says nothing but its own end of turn."""
    student, teacher = speaking("<turn>"), saying(end, speaking(end))
    writer = TeacherWriter(
        teacher=teacher, student=student, sampling=Sampling(max_completion_length=3), context=same_prompt()
    )
    (rollout,) = writer([CHAT], seed=(0, 0))
    assert rollout.finished
    assert tokens(student, rollout) == ["<turn>"]
    assert tokens(teacher, writer.own([CHAT], seed=(0, 0))[0]) == [end]


def test_sampler_text_has_no_end_of_turn_that_is_added_text():
    """A tokenizer to which the end of turn was added as text, so that it is decoded."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["<turn>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    lm = saying("<turn>", tiny(tokenizer=tokenizer))
    (rollout,) = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=3))([CHAT], seed=(0, 0))
    assert tokens(lm, rollout) == ["<turn>"]
    assert rollout.text == ""
    assert lm.tokenizer.decode(rollout.response_ids, skip_special_tokens=True) == "<turn>"


def test_sampler_text_has_space_behind_prompt_of_sentence_piece():
    lm = saying("▁a", tiny(tokenizer=llama()))
    (rollout,) = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=2))([TEXT], seed=(0, 0))
    assert rollout.text == " a a"
    student = speaking("<turn>", "Ġ a")
    assert tokens(student, in_tokens_of(student, rollout)) == ["Ġa", "Ġa"]


def llama() -> Any:
    """As of Llama 2: a text's first space is not decoded."""
    tokenizer = sentence_piece("▁ a", characters="hi", prefix=True)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)  # type: ignore[assignment]
    return tokenizer
