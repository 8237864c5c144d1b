"""Which rows of a data section are kept: similarities against plain Python, what is counted, and the messages."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import byte_tokenizer

from opd.data.encoder import load_encoder
from opd.data.prompts import check_data, load_prompts, load_selected
from opd.data.selection import select
from opd.data.similarity import grams, nearest_cosine, normalised, repeats
from opd.errors import ConfigError, DataError
from opd.messages import question_of
from opd.recipe.load import parse_recipe, parse_section
from opd.recipe.schema import DataSection, SelectSection
from opd.types import Prompt

THEIRS = ["What is 2+2?", "Name a prime number above 10.", "Sum the integers from 1 to 100."]
OURS = [
    "what is  2+2?",  # equal but for case and blanks
    "What is 2-2?",
    "Write a poem about the sea.",
    "Sum the integers from 1 to 1000.",
    "Write a poem about the sea!",
    "What is 2+2?",
]


def write(path: Path, prompts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("ours.jsonl"), OURS)
    write(Path("theirs.jsonl"), THEIRS)


def section(**fields: Any) -> DataSection:
    return parse_section(DataSection, fields, "data")


def chosen(**select: Any) -> list[int]:
    return [prompt.id for prompt in loaded(**select)[0]]


def loaded(path: str = "ours.jsonl", **select: Any) -> tuple[list[Prompt], list[str]]:
    if select.get("keep") and "by" not in select:
        select["by"] = {"path": "theirs.jsonl"}
    prompts, selected = load_selected(section(path=path, select=select))
    return prompts, [str(one) for one in selected]


# --- similarities, once more in plain Python -------------------------------------------------------------------------


def cosine(a: str, b: str, unit: str, n: int) -> float:
    """Of n-gram counts, by loops over all pairs of n-grams."""

    def listed(text: str) -> list[tuple[str, ...]]:
        if unit == "characters":
            units = list(text)
        else:
            units, word = [], ""
            for c in text + " ":
                if c.isalnum() or c == "_":
                    word += c
                    continue
                units += [word] * bool(word) + [c] * (not c.isspace())
                word = ""
        return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)] or [tuple(units)]

    def dot(x: list[tuple[str, ...]], y: list[tuple[str, ...]]) -> int:
        return sum(u == v for u in x for v in y)  # each pair of occurrences: the product of the counts

    x, y = listed(a), listed(b)
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


TEXTS = st.lists(st.text(alphabet="ab1+ ?", min_size=1, max_size=12), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(ours=TEXTS, theirs=TEXTS, unit=st.sampled_from(["words", "characters"]), n=st.integers(1, 4))
def test_grams_cosines_equal_plain_python(ours: list[str], theirs: list[str], unit: Any, n: int):
    found = grams(theirs, unit, n).cosines()(grams(ours, unit, n))
    expected = [[cosine(a, b, unit, n) for b in theirs] for a in ours]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    nearest = nearest_cosine(grams(ours, unit, n), grams(theirs, unit, n))
    np.testing.assert_allclose(nearest, [max(row) for row in expected], atol=1e-12)


def first_kept(texts: list[str], threshold: float) -> list[bool]:
    """Repeats by the definition: like an earlier one that is itself kept."""
    kept: list[str] = []
    out: list[bool] = []
    for text in texts:
        out.append(any(cosine(text, other, "characters", 2) >= threshold for other in kept))
        if not out[-1]:
            kept.append(text)
    return out


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, threshold=st.sampled_from([0.35, 0.6, 0.85]))
def test_repeats_marks_texts_like_earlier_kept_ones(texts: list[str], threshold: float):
    assert repeats(grams(texts, "characters", 2), threshold).tolist() == first_kept(texts, threshold)


def test_repeats_and_nearest_cosine_are_unchanged_by_block(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc"), 6)) for _ in range(30)]
    whole = (
        repeats(grams(texts, "characters", 2), 0.8),
        nearest_cosine(grams(texts, "words", 1), grams(THEIRS, "words", 1)),
    )
    assert 0 < whole[0].sum() < 30
    monkeypatch.setattr("opd.data.similarity.BLOCK", 4)
    assert (repeats(grams(texts, "characters", 2), 0.8) == whole[0]).all()
    blocks = nearest_cosine(grams(texts, "words", 1), grams(THEIRS, "words", 1))
    assert (blocks == whole[1]).all()


def test_normalised_ignores_case_blanks_and_unicode_form():
    assert normalised(" What  IS\n2+2? ") == normalised("what is 2+2?")
    assert normalised("ｘ²") == normalised("x2")  # NFKC
    assert normalised("2+2") != normalised("2-2")
    assert normalised("Straße") == normalised("STRASSE")


# --- the encoder -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of random weights that reads at most 24 bytes."""
    from transformers import BertConfig, BertModel

    folder = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_embed_equals_mean_of_states_of_unpadded_text(encoder: str):
    from transformers import BertModel

    texts = ["ab", "what is two and two?", "x" * 40, "ab"]
    found, cut = load_encoder(encoder).embed(texts)
    assert cut == 1
    model = BertModel.from_pretrained(encoder).double().eval()
    tokenizer = byte_tokenizer()
    for text, vector in zip(texts, found.values, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([tokenizer(text).input_ids[:24]])).last_hidden_state[0].tolist()
        mean = [math.fsum(column) / len(states) for column in zip(*states, strict=True)]
        norm = math.sqrt(math.fsum(x * x for x in mean))
        np.testing.assert_allclose(vector, [x / norm for x in mean], atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"the weights lack 1 tensors of the model \(encoder\.layer\.0\.output\.dense\.weight\), so its"),
        ("shape", r"encoder\.layer\.0\.output\.dense\.weight has \(3,\), the model \(16, 32\)"),
        ("nan", "the weights hold NaN or infinity, so its vectors would mean nothing"),
        ("half", r"model\.safetensors \(1,000 bytes\) is not a whole safetensors file"),
    ],
)
def test_load_encoder_refuses_incomplete_weights(encoder: str, tmp_path: Path, damage: str, message: str):
    from safetensors.torch import load_file, save_file

    folder, name = tmp_path / "encoder", "encoder.layer.0.output.dense.weight"
    shutil.copytree(encoder, folder)
    file = folder / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if not key.startswith("pooler.")}
    save_file(tensors, file, {"format": "pt"})
    assert load_encoder(str(folder)).embed(["abc"])[1] == 0  # nothing reads the pooler
    changed = {"shape": torch.ones(3), "nan": torch.full_like(tensors[name], torch.nan)}
    save_file({**tensors, name: changed.get(damage, tensors[name])}, file, {"format": "pt"})
    if damage == "missing":
        save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    if damage == "half":
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=message):
        load_encoder(str(folder))


def test_select_keeps_near_and_far_by_encoder(files: None, encoder: str):
    theirs, ours = (load_encoder(encoder).embed([normalised(t) for t in texts])[0] for texts in (THEIRS, OURS))
    cosines = theirs.cosines()(ours)
    middle = float(np.quantile(cosines[[1, 2, 3, 4]].max(1), 0.5))
    expected = [i for i in range(len(OURS)) if cosines[i].max() >= middle]
    by = {"measure": "encoder", "encoder": encoder, "threshold": middle}
    assert chosen(keep="near", **by) == expected
    assert chosen(keep="far", **by) == [i for i in range(len(OURS)) if i not in expected]
    assert 2 < len(expected) < 6
    _, (line,) = loaded(keep="near", **by)
    assert line.endswith("; the encoder read only the beginning of 5 questions"), line


def test_load_encoder_refuses_other_pooling_and_empty_folder(files: None, encoder: str, tmp_path: Path):
    pooling = Path(encoder) / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    with pytest.raises(ConfigError, match=r"uses the pooling pooling_mode_cls_token, but opd averages states over"):
        chosen(keep="near", measure="encoder", encoder=encoder)
    (pooling / "config.json").unlink()
    pooling.rmdir()
    (Path(encoder) / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    assert load_encoder(encoder).embed(["123456", "12345"])[1] == 1
    (Path(encoder) / "sentence_bert_config.json").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"(?s)`select.encoder`: .*empty could not be loaded as a text encoder: .*mpnet"
    ):
        chosen(keep="near", measure="encoder", encoder=str(tmp_path / "empty"))


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_select_keeps_near_and_far_by_equal_text(files: None):
    prompts, lines = loaded(keep="near")
    assert [(p.id, p.content) for p in prompts] == [(0, OURS[0]), (5, OURS[5])]
    assert lines == ["ours.jsonl: 2 of 6 rows selected (4 not near those of theirs.jsonl by equal text)"]
    assert chosen(keep="far") == [1, 2, 3, 4]


def test_select_keeps_near_and_far_by_words(files: None):
    words = [max(cosine(normalised(a), normalised(b), "words", 2) for b in THEIRS) for a in OURS]
    expected = [i for i, value in enumerate(words) if i in (0, 5) or value >= 0.4]
    assert chosen(keep="near", measure="words", n=2, threshold=0.4) == expected == [0, 1, 3, 5]
    prompts, lines = loaded(keep="far", measure="words", n=2, threshold=0.4)
    assert [p.id for p in prompts] == [2, 4]
    assert lines == ["ours.jsonl: 2 of 6 rows selected (4 near those of theirs.jsonl by words, cosine 0.4)"]


def test_distinct_drops_repeats_within_data_set(files: None):
    assert loaded(distinct=True)[1] == ["ours.jsonl: 5 of 6 rows selected (1 like an earlier one by equal text)"]
    assert chosen(distinct=True, measure="characters", threshold=0.8) == [0, 1, 2, 3]
    far = {"keep": "far", "distinct": True, "measure": "characters", "threshold": 0.8, "limit": 1}
    assert chosen(**far) == [1]
    assert loaded(**far)[1] == [
        "ours.jsonl: 1 of 6 rows selected (3 near those of theirs.jsonl by characters, cosine 0.8; "
        "1 like an earlier one by characters, cosine 0.8; 1 beyond the limit)"
    ]
    assert loaded("theirs.jsonl", distinct=True)[1] == ["theirs.jsonl: 3 of 3 rows selected"]


def test_select_splits_rows_into_near_and_far(files: None):
    for measure in ({}, {"measure": "characters", "threshold": 0.7}, {"measure": "words", "n": 1}):
        near, far = (chosen(keep=keep, **measure) for keep in ("near", "far"))
        assert sorted(near + far) == list(range(6))
        assert near
        assert far


def test_select_compares_questions_without_template(files: None):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
    write(Path("ours.jsonl"), [messages, "Who?"])
    ours = {"path": "ours.jsonl", "chat": True, "template": "{prompt} Answer in \\boxed{{}}."}
    by = {"path": "theirs.jsonl", "template": "Question: {prompt}"}
    (prompt,) = load_prompts(section(**ours, select={"by": by, "keep": "near"}))
    assert prompt.content == (messages[0], {"role": "user", "content": "What is 2+2? Answer in \\boxed{}."})


def test_select_applies_nested_select_of_by(files: None):
    by = {"path": "theirs.jsonl", "limit": 2, "select": {"by": {"path": "ours.jsonl", "limit": 1}, "keep": "far"}}
    write(Path("mine.jsonl"), THEIRS)
    prompts, lines = loaded("mine.jsonl", by=by, keep="near")
    assert [p.content for p in prompts] == THEIRS[1:2]
    assert lines == [
        "theirs.jsonl: 1 of 2 rows selected (1 near those of ours.jsonl by equal text)",
        "mine.jsonl: 1 of 3 rows selected (2 not near those of theirs.jsonl by equal text)",
    ]


def test_load_prompts_requires_columns_of_selected_rows_only(files: None):
    rows = [{"prompt": "What is 2+2?", "answer": 4}, {"prompt": "Who?"}]
    Path("ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    near = section(path="ours.jsonl", select={"by": {"path": "theirs.jsonl"}, "keep": "near"})
    assert len(load_prompts(near, require=["answer"])) == 1
    far = section(path="ours.jsonl", select={"by": {"path": "theirs.jsonl"}, "keep": "far"})
    with pytest.raises(DataError, match=r"needs `answer` in every row, but 1 of 1 rows of ours.jsonl .* \(rows 1\)"):
        load_prompts(far, require=["answer"])


# --- what mistakes are told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"`select` selects nothing\. Give `by` and `keep`, or `distinct: true`"),
        ({"by": {"path": "theirs.jsonl"}}, r"`select` has `by` but not `keep`\. Give both"),
        ({"keep": "near"}, r"`select` has `keep` but not `by`\. Give both"),
        ({"distinct": True, "measure": "word"}, r"`select.measure`: Input should be 'exact', .* \(got 'word'\)"),
        ({"distinct": True, "threshold": 0.6}, r"`measure: exact` takes none; got 0\.6 with `measure: exact`"),
        (
            {"distinct": True, "measure": "words", "threshold": 1.5},
            r"`select.threshold`: .* less than or equal to 1 \(got 1\.5\)",
        ),
        ({"distinct": True, "n": 2}, r"`select.n` is the length of n-grams .* got 2 with `measure: exact`"),
        ({"distinct": True, "measure": "words", "n": 0}, r"`select.n`: .* greater than or equal to 1 \(got 0\)"),
        ({"distinct": True, "measure": "encoder"}, r"got None with `measure: encoder`\. Give both, or neither"),
        ({"distinct": True, "encoder": "x"}, r"got 'x' with `measure: exact`\. Give both, or neither"),
        ({"distinct": True, "limit": 0}, r"`select.limit`: .* greater than or equal to 1 \(got 0\)"),
    ],
)
def test_select_refuses_contradictory_settings(files: None, settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load_prompts(section(path="ours.jsonl", select=settings))


def test_select_raises_data_error_when_no_row_is_left(files: None):
    write(Path("ours.jsonl"), ["Who?", "Why is the sky blue?"])
    with pytest.raises(
        DataError,
        match=r"`select` leaves no row of ours.jsonl: 2 not near those of theirs.jsonl by words, cosine 0\.6\. The "
        r"nearest cosines of its questions are 0\.25 to 0\.29, half of them below .* Change `threshold`",
    ):
        chosen(keep="near", measure="words", n=1)
    with pytest.raises(DataError, match=r"teachers\.jsonl does not exist"):
        chosen(by={"path": "teachers.jsonl"}, keep="near")


def test_select_gives_kept_rows_and_dropped_counts():
    kept, what = select(["a", "b"], ["A"], SelectSection(by=DataSection(path="x"), keep="far"), "rows")
    assert (kept, what.dropped, what.read, what.kept) == ([1], {"near those of x by equal text": 1}, 2, 1)


def test_check_data_accepts_settings_of_prompts_page():
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()
    blocks = [yaml.safe_load(block.split("```")[0]) for block in page.split("```yaml\n")[1:]]
    assert len(blocks) == 4
    *sections, (stage,) = blocks
    for block in sections:
        check_data(section(**block["data"]))
    models = {name: {"path": f"./{name}"} for name in ("student", "teacher")}
    recipe = parse_recipe({"name": "docs", "models": models, "stages": [stage]})
    assert [task.share for task in recipe.stages[0].tasks.values()] == [3, 1]


def test_question_of_gives_text_of_user_messages():
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    content = ({"role": "system", "content": "s"}, {"role": "user", "content": parts})
    assert question_of(content) == "what?"
    said = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    assert question_of(said) == "a\nc"
    assert question_of("plain") == "plain"
