"""GUI-SD: the box and the fade, the weights of digits and of certainty, and a step on pictures against the formula."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from PIL import Image as Pillow
from support.models import rollout_of, tiny
from support.visions import colour, noise, vision

from opd import methods
from opd.data.toy_pictures import clicked, clicks, moving_dot
from opd.errors import ConfigError, DataError
from opd.loss.collate import collate
from opd.loss.step import gradient, scored
from opd.models.language_model import LanguageModel
from opd.models.render import render
from opd.pieces import boxes, weights
from opd.teachers.local import local_teacher
from opd.types import Image, Prompt, Rollout, Scores, Unwritten


@pytest.fixture(scope="module")
def lm(tmp_path_factory: Any) -> LanguageModel:
    return vision("llava", tmp_path_factory.mktemp("gui") / "llava")


def pixels(image: Image) -> Any:
    return np.asarray(Pillow.open(io.BytesIO(image.content or b"")).convert("RGB"))


def ids_of(lm: LanguageModel, text: str) -> list[int]:
    return lm.tokenizer(text).input_ids


def response(lm: LanguageModel, prompt: Prompt, text: str) -> Rollout:
    return rollout_of(lm, prompt, [*ids_of(lm, text), lm.tokenizer.eos_token_id])


def unwritten(prompt: Prompt) -> Rollout:
    return Unwritten(prompt=prompt, sample=0, prompt_ids=(), finished=True, text="")


# --- the picture -----------------------------------------------------------------------------------------------------


def test_faded_equals_formula_at_every_pixel():
    got, (left, top, right, bottom) = boxes.faded(20, 12, (4, 3, 9, 6)), (4, 3, 9, 6)
    spread = max(1.5 * 5, math.sqrt(0.1) * 12)
    for y in range(12):
        for x in range(20):
            across = max(0, left - x, x - (right - 1))
            down = max(0, top - y, y - (bottom - 1))
            assert got[y, x] == pytest.approx(math.exp(-(across**2 + down**2) / (2 * spread**2)), abs=1e-12)
    assert bool((got[3:6, 4:9] == 1).all())


def test_drawn_puts_green_line_outside_box():
    plain = colour(200, 100, 50)
    got = pixels(boxes.drawn(plain, (10, 12, 20, 22), 2, False, "Prompt 0"))
    line = np.zeros((32, 32), bool)
    line[10:24, 8:22] = True
    line[12:22, 10:20] = False
    assert bool((got[line] == (0, 128, 0)).all())
    assert bool((got[~line] == (200, 100, 50)).all())


def test_boxed_draws_box_of_toy_task_and_says_hint():
    for row in clicks(count=20, shapes=2, seed=3):
        image, marked = (Image(name="a", digest=str(k), content=row[k][0]) for k in ("images", "privileged_images"))
        prompt = Prompt(id=0, content=row["prompt"], images=(image,), metadata={"box": row["box"]}, answer="5")
        rollout = unwritten(prompt)
        (box,) = boxes.boxed("box", width=2, fade=False)([rollout])
        assert bool((pixels(box.images[0]) == pixels(marked)).all())
        assert box.content == row["prompt"]
        (hint,) = boxes.boxed("hint", width=2)([rollout])
        assert hint.content == f"{row['prompt']} Hint: The answer is located within the green rectangle."
        (gt,) = boxes.boxed("gt")([rollout])
        assert str(gt.content).endswith("It is 5.")
        assert boxes.boxed("none")([rollout]) == [prompt]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (None, r"Prompt 4: `box` is None\. Give four numbers, in pixels"),
        ("1,2,3,4", r"Prompt 4: `box` is '1,2,3,4'"),
        ([1, 2, 3], r"`box` is \[1, 2, 3\]\. Give four numbers"),
        ([1, 2, float("nan"), 4], r"Give four numbers"),
        ([9, 2, 9, 4], r"a box without pixels\. Give left < right"),
        ([1, 2, 33, 4], r"Prompt 4: the box \[1, 2, 33, 4\] is not inside the image noise 1 of 32 x 32 pixels"),
        ([-1, 2, 3, 4], r"is not inside the image"),
    ],
)
def test_boxed_refuses_bad_box(box: Any, message: str):
    prompt = Prompt(id=4, content="a<image>", images=(noise(1),), metadata={"box": box})
    with pytest.raises(DataError, match=message):
        boxes.boxed()([unwritten(prompt)])


def test_boxed_refuses_prompt_without_image_and_no_line():
    with pytest.raises(DataError, match=r"Prompt 1 has no image to mark\. Give the column `images`"):
        boxes.boxed()([unwritten(Prompt(id=1, content="a", metadata={"box": [1, 2, 3, 4]}))])
    with pytest.raises(ConfigError, match="at least 1 pixel wide, got 0"):
        boxes.boxed(width=0)


# --- the weights -----------------------------------------------------------------------------------------------------


def weights_of(weight: Any, lm: LanguageModel, text: str, entropy: list[float] | None = None) -> list[float]:
    one = response(lm, Prompt(id=0, content="a"), text)
    spread = None if entropy is None else torch.tensor(entropy)
    scores = Scores(teacher_logp=torch.zeros(len(one.response_ids)), teacher_entropy=spread)
    return weight.with_tokenizer(lm.tokenizer)(collate([one], [scores], torch.device("cpu")))[0].tolist()


def test_place_values_equal_paper_for_numbers(lm: LanguageModel):
    got = weights_of(weights.place_values(), lm, "(512,7)")
    assert got == pytest.approx([0.1, 3, 2, 1, 0.1, 1, 0.1, 0.1])
    assert sum(got[:-1]) / 7 == pytest.approx(1.04, abs=5e-3)  # without the end, as the page says
    assert weights_of(weights.place_values(2.0, 0.0), lm, "4096a") == [2, 2, 2, 1, 0, 0]


def test_place_values_refuse_tokenizer_without_digits():
    with pytest.raises(ConfigError, match=r"no token of the student's tokenizer is one digit"):
        weights.place_values().with_tokenizer(tiny().tokenizer)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="at least 0, got cap -1"):
        weights.place_values(-1)


def test_certain_is_one_minus_relative_entropy(lm: LanguageModel):
    most = math.log(lm.vocabulary)
    got = weights_of(weights.certain(), lm, "a1", [0.0, most / 4, most * 1.001])
    assert got == pytest.approx([1.0, 0.75, 0.0], abs=1e-6)


# --- a step ----------------------------------------------------------------------------------------------------------


def test_gui_sd_loss_equals_formula_on_pictures(lm: LanguageModel):
    """Equal words, other pixels: the teacher's distribution is that of the box, and no cache is shared with it."""
    method = methods.build("gui_sd", {"hint": "box", "width": 2}).with_tokenizer(lm.tokenizer)
    prompts = [
        Prompt(id=i, content="ab<image>c", images=(noise(i),), metadata={"box": [4, 5, 14, 15]}) for i in range(2)
    ]
    rollouts = [response(lm, prompt, text) for prompt, text in zip(prompts, ("(12,7)", "a40"), strict=True)]
    contexts = method.context(rollouts)
    assert [one.content for one in contexts] == [one.content for one in prompts]
    teacher = local_teacher(method.teacher, lm, None, micro_batch_tokens=1000)
    phase = scored(method, teacher, rollouts, contexts, method.request(), lm.device)
    loss, _ = gradient(method, lm, teacher, phase, 1000)
    lm.model.zero_grad()

    total, count = 0.0, 0
    for rollout, context in zip(rollouts, contexts, strict=True):
        ids = rollout.response_ids.tolist()
        rows = [render(one, lm.tokenizer) for one in (rollout.prompt, context)]
        assert lm.tokenizer.plain(rows[0]) == lm.tokenizer.plain(rows[1])
        assert rows[0] != rows[1]
        with torch.no_grad():  # each row whole and alone, without a prefix
            logits = [
                lm.head().logits(lm.hidden(torch.tensor([[*row, *ids[:-1]]]))[0, len(row) - 1 :]).tolist()
                for row in rows
            ]
        texts = [lm.tokenizer.decode([i]) for i in ids]
        for t, (mine, theirs) in enumerate(zip(*logits, strict=True)):
            p, q = oracle.log_softmax(mine), oracle.log_softmax(theirs)
            place = 0
            while t + place < len(texts) and texts[t + place] in "0123456789":
                place += 1
            w = (min(place, 3) if place else 0.1) * (1 - oracle.entropy(q) / math.log(lm.vocabulary))
            total += w * sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -1e8)
            count += 1
    assert loss == pytest.approx(total / count, rel=1e-4)
    assert loss > 0


# --- the toy tasks ---------------------------------------------------------------------------------------------------


def test_clicks_place_is_middle_of_named_square():
    for row in clicks(count=50, shapes=3, seed=1, part="held_out"):
        prompt = Prompt(id=0, content=row["prompt"], metadata={"box": row["box"]})
        assert clicked(prompt, row["response"]) == 1
        assert clicked(prompt, "(99,99)") == clicked(prompt, "7") == 0
        shown = np.asarray(Pillow.open(io.BytesIO(row["images"][0])))
        x, y = int(row["response"][1:3]), int(row["response"][4:6])
        named = {"red": (255, 0, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255, 255, 255)}
        assert tuple(shown[y, x]) == named[row["prompt"].removesuffix("<image>")]


def middles(row: dict[str, Any]) -> list[tuple[int, int]]:
    """The dot's middle pixel in each frame, column and row."""
    frames = [np.asarray(Pillow.open(io.BytesIO(one))) for one in row["images"]]
    places = [np.argwhere((frame != 64).any(-1)).mean(0) for frame in frames]
    return [(int(x), int(y)) for y, x in places]


def test_moving_dot_moves_as_the_answer_says():
    for row in moving_dot(count=60, traced=True):
        places = middles(row)
        (x0, y0), (x1, y1) = places[0], places[-1]
        assert {"L": x1 < x0, "R": x1 > x0, "U": y1 < y0, "D": y1 > y0}[row["answer"]]
        assert row["response"] == ">".join(f"{x // 8}{y // 8}" for x, y in places) + ":" + row["answer"]
        assert len(set(places)) == 4


def test_moving_dot_orders_differ_in_frames_alone():
    rows = {order: list(moving_dot(count=40, order=order)) for order in ("forward", "reversed", "shuffled", "still")}
    for forward, back, mixed, still in zip(*rows.values(), strict=True):
        assert forward["response"] == back["response"] == mixed["response"] == still["response"] == forward["answer"]
        assert back["images"] == forward["images"][::-1]
        assert mixed["images"] != forward["images"]
        assert sorted(mixed["images"]) == sorted(forward["images"])
        assert still["images"] == forward["images"][:1] * 4


def test_moving_dot_shows_response_in_the_share_that_knows():
    rows = list(moving_dot(count=200, traced=True, knowing=0.4))
    known = [row for row in rows if row["prompt"] == f"{row['response']};" + "<image>" * 4]
    assert 55 <= len(known) <= 105
    assert {row["prompt"] for row in rows if row not in known} == {"<image>" * 4}


def test_clicks_parts_share_no_picture():
    shown = [{row["images"][0] for row in clicks(count=60, shapes=1, part=part)} for part in ("train", "held_out")]
    assert not shown[0] & shown[1]
    with pytest.raises(ConfigError, match="a picture holds 1 to 3 squares"):
        next(iter(clicks(count=1, shapes=4)))


def test_clicks_rows_load_as_prompts(tmp_path: Path):
    from opd.data.prompts import prompts_of_rows

    (one, *_) = prompts_of_rows(list(clicks(count=3)))
    assert len(one.images) == len(one.privileged_images) == 1
    assert set(one.metadata) == {"box"}
