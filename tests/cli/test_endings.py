"""A base model in Gemma's form learns to end a turn: SFT, then OPD, then transformers' own `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.pairs import byte_bpe

import opd
from opd.recipe.load import parse_recipe
from opd.runs.checks import check_stages
from opd.runs.prepare import Given

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
WORDS = {"red": "stop", "green": "go", "blue": "sky", "black": "night"}
SHAPE = {
    "model_type": "gemma3_text",
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def recipe(folder: Path) -> dict[str, Any]:
    """Teacher and student learn from responses, then the student from the teacher."""
    tokenizer = byte_bpe(special=SPECIAL)
    tokenizer.bos_token, tokenizer.chat_template = "<bos>", GEMMA
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [{"prompt": word, "response": answer, "answer": answer} for word, answer in WORDS.items()]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def model(hidden_size: int) -> dict[str, Any]:
        return {"init": {**SHAPE, "hidden_size": hidden_size}, "tokenizer": str(folder / "tokenizer")}

    def stage(name: str, model: str, steps: int, method: str = "sft", **more: Any) -> dict[str, Any]:
        return {"name": name, "train": model, "method": method, "steps": steps, **more}

    return {
        "name": "gemma",
        "output_dir": str(folder / "run"),
        "models": {"teacher": model(48), "student": model(32)},
        "defaults": {
            "data": {"path": str(folder / "words.jsonl"), "chat": True},
            "prompts_per_step": 4,
            "sampling": {"max_completion_length": 12},
            "optimizer": {"learning_rate": 0.01},
        },
        "stages": [
            stage("teach", "teacher", 60),
            stage("cold", "student", 40),
            stage("distil", "student", 20, "reverse_kl", teacher="teacher", optimizer={"learning_rate": 0.003}),
        ],
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> opd.Run:
    return opd.run(recipe(tmp_path_factory.mktemp("gemma")), quiet=True)


@pytest.mark.parametrize("stage", ["teach", "cold", "distil"])
def test_trained_model_stops_in_generate(trained: opd.Run, stage: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (found,) = trained.folder.glob(f"*{stage}*/model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(found), AutoTokenizer.from_pretrained(found)
    for word, answer in WORDS.items():
        read = tokenizer.apply_chat_template(
            [{"role": "user", "content": word}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**read, max_new_tokens=12, do_sample=False)[0, read["input_ids"].shape[1] :]
        # Whether a short distillation keeps every answer depends on the processor's rounding; that it ends does not.
        right = [answer] if stage != "distil" else list(WORDS.values())
        assert tokenizer.decode(written) in [f"{one}<end_of_turn>" for one in right]


def test_check_says_what_ends_response(tmp_path: Path):
    found = check_stages(parse_recipe(recipe(tmp_path)), Given())
    says = "a response ends with '<end_of_turn>', as its chat template ends a turn; '<eos>' also stops sampling"
    assert f"student: {says}" in found.lines["distil"]
    assert f"teacher: {says}" in found.lines["teach"]
