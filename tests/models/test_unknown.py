"""Text that a tokenizer does not know is named before a run: the model reads one token for all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.models import LETTERS, byte_tokenizer, character_tokenizer
from support.runs import command, one_stage, prepare, tiny_model, write_rows
from tokenizers import Tokenizer
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from opd.models.unknown import unknown_id, unknown_lines


def test_unknown_id_is_none_where_every_text_is_known():
    assert unknown_id(byte_tokenizer()) is None


def test_unknown_id_is_none_where_it_ends_a_text():
    """GPT-2's unknown token also separates texts, so a prompt with this token need not hold unknown text."""
    core = Tokenizer(token_models.Unigram([("<|end|>", 0.0), ("a", -1.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", unk_token="<|end|>")
    assert unknown_id(tokenizer) is None


def test_unknown_lines_count_rows_and_name_what_is_unknown():
    tokenizer = character_tokenizer(LETTERS)
    texts = ["ab", "a?b!?", "!"]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert unknown_id(tokenizer) == tokenizer.pad_token_id
    assert unknown_lines("student", tokenizer, ids[:1], texts.__getitem__, "prompts") == []
    assert unknown_lines("student", tokenizer, ids, texts.__getitem__, "prompts") == [
        "student: 2 of 3 prompts hold text that its tokenizer does not know, in the first '?', '!': it is read as "
        "'<pad>'. Correct the data, or use a tokenizer that has it"
    ]


ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "response": "2;", "answer": "2"},
    {"prompt": "1 plus 2=", "response": "3;", "answer": "3"},
    {"prompt": "1+3=", "response": "4.;", "answer": "4"},
]


@pytest.mark.parametrize(
    ("method", "expected"),
    [("reverse_kl", ["1 of 3 prompts"]), ("sft", ["1 of 3 prompts", "1 of 3 responses of the data"])],
)
def test_check_says_what_the_student_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, expected: list[str]
):
    made = one_stage(method=method, data={"path": "rows.jsonl"})
    made["models"] = {"student": tiny_model(2), "teacher": tiny_model(1)}
    monkeypatch.chdir(prepare(tmp_path / "work", made))
    write_rows(Path("rows.jsonl"), ROWS)
    Path("recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    ended = command("check", "recipe.yaml")
    assert ended.code == 0, ended.err
    assert [f"student: {what} hold text that its tokenizer does not know" in ended.out for what in expected] == [
        True
    ] * len(expected)
    assert ended.out.count("does not know") == len(expected)
