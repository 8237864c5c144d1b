"""Pictures in prompts: scores and gradients equal those of transformers with `pixel_values`, for every family."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import rollout_of
from support.visions import FAMILIES, colour, noise, opened, vision, vision_folder
from torch import Tensor

from opd.errors import DataError
from opd.models import saving
from opd.models.forward import batches, response_states, shared_prefixes
from opd.models.head import UNWRITTEN, Head
from opd.models.language_model import LanguageModel, Reading
from opd.models.loading import load_model
from opd.models.pictures import MARK
from opd.models.probe import notes_on
from opd.models.render import render
from opd.models.verifying import check_saved
from opd.pieces import contexts
from opd.pieces.supports import sampled as sampled_support
from opd.recipe.schema import ModelSpec
from opd.samplers.hf import TransformersSampler
from opd.teachers.local import LocalTeacher
from opd.types import Image, Prompt, Sampling, ScoreRequest


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> dict[str, LanguageModel]:
    folder = tmp_path_factory.mktemp("vision")
    return {family: vision(family, folder / family) for family in FAMILIES}


def mark(lm: LanguageModel) -> str:
    return lm.tokenizer.pictures.mark


def prompts_for(lm: LanguageModel) -> list[Prompt]:
    """Of one and two pictures, and of none; a picture first, in the middle and last; equal words, other pixels."""
    at = mark(lm)
    shown = [
        (f"abc{at}de", (noise(1),)),
        (f"abc{at}de", (noise(2),)),
        (f"{at}ab{at}ba", (noise(2), noise(3))),
        ("abcdefgh", ()),
        (f"fgh{at}", (noise(1),)),
    ]
    return [Prompt(id=i, content=text, images=images) for i, (text, images) in enumerate(shown)]


RESPONSES = ([7, 9, 11, 1], [8, 12, 1], [10, 9, 13, 14, 15], [9, 1], [12, 13, 1])


def plain_logp(lm: LanguageModel, model: Any, prompt: Prompt, response: list[int]) -> Tensor:
    """[T, V]: log-probs of the response's places by transformers alone, from the processor's tensors."""
    images = [opened(image) for image in prompt.images]
    given = lm.tokenizer.processor(text=[prompt.content], images=[images] if images else None, return_tensors="pt")
    before = given["input_ids"].shape[1]
    new = torch.tensor([response])
    given["input_ids"] = torch.cat([given["input_ids"], new], 1)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in given:
            given[name] = torch.cat([given[name], torch.full_like(new, value)], 1)
    dtype = next(model.parameters()).dtype
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    if not images:
        given.pop("token_type_ids", None)
    logits = model(**given).logits[0, before - 1 : -1]
    masked = logits.index_fill(-1, torch.tensor(sorted(lm.unwritten)), -torch.inf)
    return masked.log_softmax(-1)


def own_logp(lm: LanguageModel, prompts: list[Prompt], responses: list[list[int]]) -> list[Tensor]:
    """[T, V] of each row, as opd scores and trains."""
    ids = [render(prompt, lm.tokenizer) for prompt in prompts]
    states = response_states(lm, ids, responses)
    return [lm.head().logits(states.of(i, len(r))).log_softmax(-1) for i, r in enumerate(responses)]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_those_of_transformers(models: dict[str, LanguageModel], family: str):
    lm = models[family]
    assert lm.reading == Reading()
    prompts = prompts_for(lm)
    with torch.no_grad():
        for got, prompt, response in zip(own_logp(lm, prompts, list(RESPONSES)), prompts, RESPONSES, strict=True):
            expected = plain_logp(lm, lm.model, prompt, response)
            written = [i for i in range(expected.shape[1]) if i not in lm.unwritten]
            torch.testing.assert_close(got[:, written], expected[:, written], atol=1e-5, rtol=0)
            assert bool((got[:, sorted(lm.unwritten)] < UNWRITTEN / 2).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_that_of_transformers(models: dict[str, LanguageModel], family: str):
    """Of all parameters, the vision tower's included, in float64. Some families round to float32 in their layers."""
    most = 1e-6 if family in ("gemma3", "idefics2", "mistral3") else 1e-10
    model = copy.deepcopy(models[family].model).double()
    lm = LanguageModel(
        model=model,
        tokenizer=models[family].tokenizer,
        vocabulary=models[family].vocabulary,
        stop_ids=models[family].stop_ids,
        unwritten=models[family].unwritten,
    )
    prompts, responses = prompts_for(lm), list(RESPONSES)
    states = response_states(lm, [render(prompt, lm.tokenizer) for prompt in prompts], responses)
    masked = torch.tensor(sorted(lm.unwritten))
    total = sum(
        torch.nn.functional.linear(states.of(i, len(r)), lm.head().weight)
        .index_fill(-1, masked, -torch.inf)
        .log_softmax(-1)
        .gather(-1, torch.tensor(r)[:, None])
        .sum()
        for i, r in enumerate(responses)
    )
    assert isinstance(total, Tensor)
    total.backward()
    own = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected = sum(
        plain_logp(lm, model, prompt, r).gather(-1, torch.tensor(r)[:, None]).sum()
        for prompt, r in zip(prompts, responses, strict=True)
    )
    assert isinstance(expected, Tensor)
    assert abs(total.item() - expected.item()) < 10 * most
    expected.backward()
    for name, p in model.named_parameters():
        assert (own[name] is None) == (p.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(own[name], p.grad, atol=most, rtol=10 * most, msg=lambda m, n=name: f"{n}: {m}")
    assert any("vision" in name and g is not None and bool(g.abs().max() > 1e-3) for name, g in own.items())


# --- pictures are kept apart -----------------------------------------------------------------------------------------


def test_codes_name_pixels_and_keep_words(models: dict[str, LanguageModel]):
    lm = models["llava"]
    one, other = (
        render(Prompt(id=i, content="ab<image>c", images=(colour(200 * i, 0, 0),)), lm.tokenizer) for i in (0, 1)
    )
    assert len(one) == len(other) == 3 + 16
    assert [a == b for a, b in zip(one, other, strict=True)] == [True] * 2 + [False] * 16 + [True]
    assert lm.tokenizer.plain(one) == lm.tokenizer.plain(other)
    assert lm.tokenizer.decode(one) == "ab" + 16 * "<image>" + "c"
    assert one == render(Prompt(id=9, content="ab<image>c", images=(colour(0, 0, 0),)), lm.tokenizer)


def sampled(lm: LanguageModel, prompts: list[Prompt], n: int = 2) -> list[list[int]]:
    sampling = Sampling(max_completion_length=6, n=n, temperature=1.3)
    return [r.response_ids.tolist() for r in TransformersSampler(lm=lm, sampling=sampling)(prompts, seed=(0, 1))]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_gives_each_picture_its_own_responses(models: dict[str, LanguageModel], family: str):
    """Rows of one batch, which share prefixes and caches, are those of each prompt alone."""
    lm = models[family]
    prompts = prompts_for(lm)
    together = sampled(lm, prompts)
    alone = [row for prompt in prompts for row in sampled(lm, [prompt])]
    assert together == alone
    assert together[:2] != together[2:4]  # equal words, other pictures
    assert not {i for row in together for i in row} & lm.unwritten


def test_sampler_never_writes_placeholder_that_is_most_likely(tmp_path: Path):
    lm = vision("llava", tmp_path / "llava")
    with torch.no_grad():
        lm.model.lm_head.weight[2] = 100 * lm.model.lm_head.weight[3:].mean(0)
    rows = sampled(lm, prompts_for(lm), n=8)
    assert 2 not in {i for row in rows for i in row}


def test_shared_prefixes_end_outside_of_pictures(models: dict[str, LanguageModel]):
    lm = models["llava"]
    prompts = [Prompt(id=i, content="abcdefghabcdefgh<image>", images=(noise(i),)) for i in (1, 1, 2)]
    ids = [render(prompt, lm.tokenizer) for prompt in prompts]
    found = shared_prefixes(ids)
    assert found is not None
    assert {len(prefix) for prefix in found} == {16}  # the picture at the end is not cut
    same = shared_prefixes([[*row, 5] for row in ids])
    assert same is not None
    assert same[0] == same[1] != same[2]  # a group shares its picture, and no other's


def test_forward_refuses_part_of_picture_and_unknown_one(models: dict[str, LanguageModel]):
    lm = models["llava"]
    ids = render(Prompt(id=3, content="a<image>b", images=(noise(1),)), lm.tokenizer)
    for part in (ids[:9], ids[4:], [*ids[:6], *ids[7:]], [*ids[:16], 4]):
        with pytest.raises(DataError, match="a forward would read a part of the image noise 1"):
            lm.hidden(torch.tensor([part]))
    with pytest.raises(DataError, match="holds the code of a picture that this process has not read"):
        lm.hidden(torch.tensor([[5, MARK | 12345 << 14]]))


def test_pictures_are_made_again_when_not_kept(models: dict[str, LanguageModel], tmp_path: Path):
    lm = models["llava"]
    pictures = replace(lm.tokenizer.pictures, limit=1, known={}, by_code={}, kept=OrderedDict(), held=0)
    file = tmp_path / "a.png"
    file.write_bytes(noise(7).content or b"")
    image = Image(name="a.png", digest="7", path=file)
    made = pictures.picture(image, "Prompt 0")
    expected = pictures.tensors(made)["pixel_values"]
    pictures.picture(noise(8), "Prompt 1")
    assert list(pictures.kept) != [made.digest]  # one picture is kept
    assert torch.equal(pictures.tensors(made)["pixel_values"], expected)
    pictures.picture(noise(9), "Prompt 2")
    file.write_bytes(noise(8).content or b"")
    with pytest.raises(DataError, match=r"Prompt 0: the image a\.png has changed since the run began"):
        pictures.tensors(made)


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_head_gives_unwritten_tokens_no_mass(softcap: float | None):
    draws = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(*shape, generator=draws) for shape in ((7, 4), (5, 4)))
    head = Head(weight=weight, bias=None, vocabulary=6, softcap=softcap, unwritten=torch.tensor([1, 4]))
    plain = replace(head, unwritten=None).logits(hidden)
    kept = [0, 2, 3, 5]
    expected = plain[:, kept].log_softmax(-1)
    assert torch.allclose(head.logits(hidden).log_softmax(-1)[:, kept], expected)
    assert bool((head.logits(hidden).softmax(-1)[:, [1, 4]] == 0).all())
    memory = torch.empty(5, 6)
    rows = head.project_into(memory, hidden, 2.0)
    head.finish_(rows, 2.0)
    assert torch.allclose(rows.log_softmax(-1)[:, kept], (plain[:, kept] / 2).log_softmax(-1), atol=1e-6)
    ids = torch.tensor([[4, 0, 2]] * 5)
    some = plain.gather(-1, ids).clone()
    head.finish_(some, 1.0, ids)
    assert bool((some[:, 0] == UNWRITTEN).all())


# --- other ways to load ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [{"lora": {"rank": 2}}, {"gradient_checkpointing": True}, {"autocast": True}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_encoder_trains_and_is_saved_however_loaded(spec: dict[str, Any], tmp_path: Path):
    folder = vision_folder("llava", tmp_path / "llava")
    lm = load_model(ModelSpec.model_validate({"path": str(folder), **spec}), name="m", trains=True)
    prompts = prompts_for(lm)[:2]
    lm.model.train()
    scores = own_logp(lm, prompts, list(RESPONSES[:2]))
    torch.cat(
        [logp.gather(-1, torch.tensor(r)[:, None]) for logp, r in zip(scores, RESPONSES, strict=False)]
    ).sum().backward()
    moved = [n for n, p in lm.model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())]
    assert any("vision_tower" in name for name in moved)
    assert any("language_model" in name for name in moved)
    lm.model.eval()
    saved = tmp_path / "saved"
    saved.mkdir()
    saving.save(lm, saved)
    assert check_saved(lm, saved, render(prompts[0], lm.tokenizer)) < 1e-3


def test_privileged_images_are_read_in_place_of_images(models: dict[str, LanguageModel]):
    """The self-teacher's scores of equal words are those of the other picture."""
    lm = models["llava"]
    prompt = Prompt(id=0, content="abc<image>de", images=(noise(1),), privileged_images=(noise(2),))
    rollout = rollout_of(lm, prompt, [7, 9, 1])
    (context,) = contexts.privileged(images=True)([rollout])
    teacher = LocalTeacher(lm=lm, micro_batch_tokens=100, student_device=lm.device)
    (got,) = teacher.score([rollout], [context], ScoreRequest(support=sampled_support()))
    with torch.no_grad():
        of = {
            seed: plain_logp(lm, lm.model, Prompt(id=0, content="abc<image>de", images=(noise(seed),)), [7, 9, 1])
            for seed in (1, 2)
        }
    expected, other = (of[seed].gather(-1, torch.tensor([[7], [9], [1]]))[:, 0] for seed in (2, 1))
    torch.testing.assert_close(got.teacher_logp, expected, atol=1e-5, rtol=0)
    assert float((got.teacher_logp - other).abs().max()) > 1e-3
    with pytest.raises(DataError, match=r"Prompt 0 has 1 images and 0 `privileged_images`"):
        contexts.privileged(images=True)([rollout_of(lm, replace(prompt, privileged_images=()), [7, 1])])


@pytest.mark.parametrize(("size", "counted"), [((8, 8), 16), ((4, 8), 32), (None, 0), ([7, 3, 3], 0)])
def test_patches_of_other_configs_are_counted_or_noted(models, monkeypatch, size, counted):
    """InternVL's config has two sides, Florence 2's one of each stage."""
    lm = models["llava"]
    monkeypatch.setattr(lm.causal_lm.config.vision_config, "patch_size", size)
    prompt = render(prompts_for(lm)[0], lm.tokenizer)
    assert sum(lm.encoded(prompt).values()) == counted
    assert any("no patch size in its vision config" in note for note in notes_on(lm)) == (counted == 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_count_what_the_encoder_reads(models: dict[str, LanguageModel], family: str):
    lm = models[family]
    prompts = [render(prompt, lm.tokenizer) for prompt in prompts_for(lm)]
    config = lm.causal_lm.config.vision_config
    pixels = [
        lm.tokenizer.pictures.tensors(lm.tokenizer.pictures.picture(noise(i), "p"))["pixel_values"] for i in (1, 2)
    ]
    patches = [one.numel() // (3 * config.patch_size**2) for one in pixels]
    assert min(patches) >= 16
    assert list(lm.encoded(prompts[0]).values()) == patches[:1]
    assert lm.encoded(prompts[3]) == {}
    assert len(lm.encoded(prompts[2])) == 2
    two = [prompts[0], prompts[1]]
    text = 2 * (len(two[0]) + 3)
    if shared := shared_prefixes(two):
        text = max(map(len, shared)) * len(set(shared)) + 2 * (len(two[0]) + 3 - len(shared[0]))
    assert len(batches(lm, two, [3, 3], text + sum(patches))) == 1
    assert len(batches(lm, two, [3, 3], text + sum(patches) - 1)) == 2
    same = [two[0]] * 4  # one picture, encoded once
    fits = len(two[0]) * 4 + 4 * 3 + patches[0]
    assert len(batches(lm, same, [3] * 4, fits)) == 1
