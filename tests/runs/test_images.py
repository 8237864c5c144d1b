"""Recipes with images: trained, saved and continued; and what is wrong in them is said, each with its own message."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image as Pillow
from support.models import tiny
from support.runs import one_stage, tiny_model
from support.visions import noise, opened, tokenizer, vision, vision_folder
from transformers import AutoModelForImageTextToText, AutoProcessor

import opd
from opd.commands.check import check_recipe
from opd.commands.rollouts import write_rollouts
from opd.data.prompts import prompts_of_rows
from opd.errors import ConfigError, DataError, OPDError
from opd.models import processors
from opd.models.loading import load_model
from opd.models.render import render, render_checked
from opd.models.tokenizer_files import load_tokenizer
from opd.recipe.load import load_recipe
from opd.recipe.schema import ModelSpec
from opd.runs.checks import check_stages
from opd.runs.prepare import Given
from opd.types import Prompt

USER = {"role": "user", "content": "what?"}


def seeing(seed: int, **spec: Any) -> dict[str, Any]:
    """A model section: a LLaVA of a few thousand random weights."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {"model_type": "llama", **small, "num_hidden_layers": 1, "max_position_embeddings": 128}
    eye = {"model_type": "clip_vision_model", **small, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    init = {"model_type": "llava", "vision_feature_layer": -1, "text_config": text, "vision_config": eye}
    return {"init": init, "tokenizer": {"characters": "which?rb"}, "seed": seed, **spec}


def recipe(**changes: Any) -> dict[str, Any]:
    made = one_stage(**{"sampling": {"max_completion_length": 3, "n": 2}, **changes})
    return made | {"models": {"teacher": seeing(1), "student": seeing(2)}}


def prepare(folder: Path, described: dict[str, Any], row: dict[str, Any] | None = None) -> Path:
    """`folder` with a recipe and four rows of a red or blue image, the last one changed by `row`."""
    rows: list[dict[str, Any]] = []
    for i in range(4):
        Pillow.new("RGB", (32, 32), [(255, 0, 0), (0, 0, 255)][i % 2]).save(folder / f"{i}.png")
        rows.append({"prompt": "which<image>?", "images": [f"{i}.png"], "response": "rb"[i % 2]})
    rows[-1] |= row or {}
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(described))
    return folder / "recipe.yaml"


# --- a run -----------------------------------------------------------------------------------------------------------


def test_run_trains_and_saves_model_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    opd.run(prepare(tmp_path, recipe()), quiet=True)
    folder = tmp_path / "run" / "distil" / "model"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    lm = load_model(ModelSpec(path=str(folder)), name="saved")
    image = noise(1)
    given = processor(text=["which<image>?"], images=[[opened(image)]], return_tensors="pt")
    with torch.no_grad():
        expected = model(**given).logits[0, -1]
        ids = render(Prompt(id=0, content="which<image>?", images=(image,)), lm.tokenizer)
        got = lm.head().logits(lm.hidden(torch.tensor([ids]))[0, -1])
    written = [i for i in range(len(expected)) if i not in lm.unwritten]
    torch.testing.assert_close(got[written], expected[written], atol=1e-5, rtol=0)
    assert (folder / "processor_config.json").exists()
    assert "AutoModelForImageTextToText" in (folder / "README.md").read_text()


def test_run_keeps_what_student_and_teacher_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    data = {"data": {"path": "train.jsonl"}, "sampling": {"greedy": {"temperature": 0, "max_completion_length": 3}}}
    boxed = {
        "method": "gui_sd",
        "options": {"hint": "box", "width": 1, "fade": False, "digits": False},
        "teacher": None,
        "evaluate": data,
    }
    path = prepare(tmp_path, recipe(steps=2, samples_every=1, **boxed))
    lines = [
        {**json.loads(line), "box": [8, 8, 16, 20]} for line in (tmp_path / "train.jsonl").read_text().splitlines()
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opd.run(path, quiet=True)
    stage = tmp_path / "run" / "distil"
    files = [*stage.glob("samples/*.parquet"), *stage.glob("held_out_*.parquet")]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    own = {one["image"] for row in rows for one in row["images"] or ()}
    theirs = {one["image"] for row in rows for one in row["teacher_images"] or ()}
    assert (len(own), len(theirs), own & theirs) == (2, 2, set())  # a red and a blue one
    assert all(row["box"] == [8.0, 8.0, 16.0, 20.0] for row in rows)
    assert {file.stem for file in (stage / "images").iterdir()} == own | theirs
    colours = {name: Pillow.open(stage / f"images/{name}.png").getpixel((7, 7)) for name in own | theirs}
    assert {colours[name] for name in own} == {(255, 0, 0), (0, 0, 255)}
    assert {colours[name] for name in theirs} == {(0, 128, 0)}  # the line of the box


def test_run_continues_to_equal_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second time knows no picture, as a new process."""
    weights: list[dict[str, torch.Tensor]] = []
    for name, stops in (("whole", [4]), ("twice", [2, 4])):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        path = prepare(folder, recipe(steps=4, checkpoint={"every": 2}))
        for steps in stops:
            processors._MADE.clear()
            opd.run(path, f"steps={steps}", quiet=True, accept_changes=True)
        weights.append(load_model(ModelSpec(path=str(folder / "run/distil/model")), name="m").model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_accept_every_form_of_image(tmp_path: Path):
    file = tmp_path / "a.png"
    file.write_bytes(noise(1).content or b"")
    drawn = Pillow.open(io.BytesIO(noise(1).content or b""))
    forms = [str(file), file, noise(1).content, {"bytes": noise(1).content, "path": None}, drawn, noise(1)]
    prompts = prompts_of_rows([{"prompt": "a<image>", "images": [form]} for form in forms])
    assert len({prompt.images[0].digest for prompt in prompts}) == 1
    (alone,) = prompts_of_rows([{"prompt": "a", "image": str(file)}])
    assert (alone.content, alone.metadata) == ("<image>a", {})


def test_rows_place_images_in_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": parts}], "images": [noise(1)]},
        {"prompt": [{"role": "user", "content": "a<image>b"}], "images": [noise(1)]},
        {"prompt": [{"role": "user", "content": [parts[0], {"type": "image", "image": noise(1)}, parts[2]]}]},
    ]
    prompts = prompts_of_rows(rows)
    assert {json.dumps(prompt.content) for prompt in prompts} == {json.dumps([{"role": "user", "content": parts}])}
    assert len({prompt.images[0].digest for prompt in prompts}) == 1
    (first,) = prompts_of_rows([{"prompt": [USER], "images": [noise(1), noise(2)]}])
    assert [part["type"] for part in first.content[0]["content"]] == ["image", "image", "text"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["gone.png"]}, r"Row 0 of prompts: `images`, image 0: gone\.png does not exist\. Paths of images"),
        ({"images": [b"no image"]}, "Row 0 of prompts: `images`, image 0: bytes is not a readable image"),
        ({"images": [7]}, "image 0 is a int, got 7. Give a path, the bytes of a file, or a PIL image"),
        ({"images": "https://x.org/a.png"}, "is the address 'https://x.org/a.png', and opd reads files. Download it"),
        ({"image": "data:image/png;base64,AA"}, "is the address 'data:image/png;base64,AA'"),
        ({"images": [noise(1), noise(2)]}, "Row 0 of prompts has 2 images, and its prompt 1 places for them"),
        ({"prompt": "a<image><image>", "images": [noise(1)]}, "has 1 images, and its prompt 2 places"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "has 0 images, and its prompt 1 places"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": noise(1)}]}], "images": [noise(1)]},
            "1 parts of type 'image', of which 1 hold an image, and a column of 1 images",
        ),
        ({"prompt": [{"role": "system", "content": "a"}], "images": [noise(1)]}, "1 images and no message of the user"),
        ({"privileged_images": [None]}, "`privileged_images`, image 0 is a NoneType"),
    ],
)
def test_row_refuses_bad_images(row: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        prompts_of_rows([{"prompt": "a<image>", **row}])


# --- models ----------------------------------------------------------------------------------------------------------


def test_render_refuses_images_for_model_of_text():
    with pytest.raises(DataError, match=r"Prompt 5 has 1 images, and .* has no processor for them: its model reads te"):
        render(Prompt(id=5, content="a<image>", images=(noise(1),)), tiny().tokenizer)


def test_render_refuses_marks_that_differ_from_images(tmp_path: Path):
    lm = vision("llava", tmp_path / "llava")
    with pytest.raises(DataError, match=r"Prompt 6 has 0 images, and its text has 1 marks '<image>' for them"):
        render(Prompt(id=6, content="a<image>"), lm.tokenizer)
    prompt = Prompt(id=7, content="ab<image>c", images=(noise(1),))
    with pytest.raises(DataError, match=r"Prompt 7 has 19 tokens, but `max_prompt_length` is 18;.* never cut"):
        render_checked([prompt], lm.tokenizer, max_prompt_length=18)
    with pytest.raises(DataError, match=r"llava: a response holds the token '<image>' \(id 2\), which stands for ima"):
        lm.check_ids([], [[5, 2, 1]])


def test_render_names_row_with_other_count_of_placeholders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lm = vision("llava", tmp_path / "llava")
    kind = type(lm.tokenizer.processor)
    one = kind.replace_image_token

    def more(self: Any, image_inputs: dict[str, Any], image_idx: int, **options: Any) -> str:
        return one(self, image_inputs, image_idx=image_idx, **options) + "<image>" * image_idx

    monkeypatch.setattr(kind, "replace_image_token", more)
    prompt = Prompt(id=8, content="<image>h<image>", images=(noise(31), noise(32)))
    with pytest.raises(
        DataError, match=r"Prompt 8: the processor makes 33 placeholders of the images .* and 32 of each"
    ):
        render(prompt, lm.tokenizer)


def test_processor_that_does_not_fit_model_is_refused(tmp_path: Path):
    folder = vision_folder("llava", tmp_path / "llava")
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "num_additional_image_tokens": 2}))
    with pytest.raises(ConfigError, match=r"its encoder gives 16 features for a picture, and its processor writes 17"):
        load_model(ModelSpec(path=str(folder)), name="llava")
    file.write_text(json.dumps({**settings, "image_token": "a"}))
    with pytest.raises(
        ConfigError, match=r"The processor writes the placeholder 'a' .* the model's config has the id 2"
    ):
        load_model(ModelSpec(path=str(folder)), name="llava")
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"models\.m: the processor in .* cannot be loaded"):
        load_tokenizer(folder, trust_remote_code=False, where="models.m")


def test_processor_without_torchvision_names_it(tmp_path: Path):
    folder = vision_folder("llava", tmp_path / "llava")
    settings = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorPil"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="Processors of this family need torchvision: install the release that fits"):
        load_tokenizer(folder, trust_remote_code=False, where="models.m")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_processor": {"size": "large"}}, r"models\.student\.image_processor cannot be used"),
        (
            {"init": {"model_type": "gemma3"}},
            r"opd makes the processor of a new model for `init: \{model_type: llava\}`",
        ),
        ({"init": tiny_model()["init"], "image_processor": {"resample": 0}}, "and `init` is of none. Remove it"),
    ],
)
def test_recipe_refuses_new_model_without_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
):
    monkeypatch.chdir(tmp_path)
    described = recipe()
    described["models"]["student"] |= changed
    with pytest.raises(OPDError, match=message):
        check_recipe(load_recipe(prepare(tmp_path, described)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"environment": {"name": "opd.environments.guessing:guessing"}},
            "conversations with an environment are of text alone",
        ),
        (
            {"method": "gui_sd", "teacher": None, "options": {"digits": False}},
            r"This run needs `box` in every row, but 4 of 4 rows",
        ),
        (
            {"method": "context_distillation", "teacher": None, "options": {"images": True, "k": None}},
            "This run needs `privileged_images` in every row",
        ),
        ({"engine": {"urls": ["http://127.0.0.1:1"]}}, "`engine`, a vLLM server, reads text alone in opd, and 4 of"),
    ],
)
def test_recipe_refuses_images_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
):
    monkeypatch.chdir(tmp_path)
    described = recipe(**changes)
    with pytest.raises(OPDError, match=message):
        check_recipe(load_recipe(prepare(tmp_path, described)))


def test_recipe_names_row_with_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"Line 4 of train\.jsonl: `images`, image 0: gone\.png does not exist"):
        check_recipe(load_recipe(prepare(tmp_path, recipe(), {"images": ["gone.png"]})))


def test_served_teacher_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    described = recipe(method="opd")
    described["models"]["teacher"] = {"server": {"urls": ["http://127.0.0.1:1"]}}
    with pytest.raises(
        ConfigError, match=r"models\.teacher, a served teacher, reads text alone in opd, and 4 of these 4"
    ):
        check_recipe(load_recipe(prepare(tmp_path, described)))


def test_several_processes_and_records_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made = load_recipe(prepare(tmp_path, recipe()))
    with pytest.raises(ConfigError, match=r"its prompts have images, and 2 processes were started.* in one process"):
        check_stages(made, Given(), processes=2)
    with pytest.raises(ConfigError, match="A file of records reads text alone in opd, and 4 of these 4 prompts have"):
        write_rollouts("nowhere", data={"path": "train.jsonl"}, sampling={}, out="out.parquet", say=print)


def test_tokenizer_of_support_has_its_placeholder():
    assert tokenizer("<image>").convert_tokens_to_ids("<image>") == 2
