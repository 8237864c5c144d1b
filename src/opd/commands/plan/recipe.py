"""From a recipe's stage to its `Work`: shapes from the configs of its models, lengths from its prompts. No weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from opd.commands.plan.formulas import BFLOAT16, BLOCK_8BIT, FLOAT32, Shape, lora_parameters, muon_moments
from opd.commands.plan.step import Student, TeacherModel, Work
from opd.errors import ConfigError
from opd.recipe.schema import ModelSpec, Recipe, StageSpec, origin_of

if TYPE_CHECKING:
    from torch import nn

    from opd.runs.prepare import Prepared
    from opd.types import Prompt

WIDTHS = {"float32": FLOAT32, "bfloat16": BFLOAT16}
PROMPTS = 256  # rendered to find the longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens; None: of the longest prompt that was rendered, and of the recipe's limit."""

    prompt: int | None = None
    context: int | None = None
    response: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A model without weights: its shape, its matrices [out, in], and what the formulas do not count."""

    shape: Shape
    matrices: list[tuple[str, int, int]]
    note: str | None = None


def work_of(
    recipe: Recipe, spec: StageSpec, prepared: Prepared, devices: int, lengths: Lengths
) -> tuple[Work, list[str]]:
    """The work of a stage's step, and notes on what is assumed. Raises ConfigError for a config that is not known."""
    from opd.engines.scoring import WIDER
    from opd.models.head import chunk_rows
    from opd.pieces.needs import Input, Trait, needs_of
    from opd.plugins import torch
    from opd.samplers.hf import ROWS

    if spec.peers:
        raise ConfigError(
            f"Stage {spec.name!r} trains several models at once, which opd plan does not count. Plan a stage without "
            "`peers`."
        )
    method, notes = prepared.method, list[str]()
    known: dict[str, Known] = {}
    student = student_of(recipe, spec, prepared, known)
    teachers = teachers_of(recipe, spec, prepared, known)
    notes += [f"{name}: {one.note}" for name, one in known.items() if one.note]
    served = any(one.place == "servers" for one in teachers)
    prompt, more = longest_prompt(recipe, spec, prepared, lengths)
    response = lengths.response or max(part.sampling.max_completion_length for part in spec.by_task.values())
    rows = chunk_rows(student.shape.vocabulary, torch.device("cuda"))
    support = method.support
    wide = max(support.k, method.top_k) if support.kind == "top_k" else 0
    if served and support.student_top_k:
        notes.append(f"a server without scores by position gets the top {WIDER * support.k} instead")
    needs = needs_of(method.source)
    other = spec.sampler or (Trait.OFF_POLICY in needs and not needs.student_writes)
    # The data has one response per prompt, whatever `sampling.n` is.
    given = "response" in needs.columns and not needs.student_writes and Input.TEACHER_MODEL not in needs
    writer: Literal["here", "engine", "other"] = "engine" if spec.engine else "other" if other else "here"
    work = Work(
        student=student,
        teachers=teachers,
        support=support.kind,
        k=wide,
        by_position=served and bool(support.student_top_k),
        prompts=spec.prompts_per_step,
        n=1 if given else max(part.sampling.n for part in spec.by_task.values()),
        prompt_tokens=prompt,
        context_tokens=lengths.context or prompt,
        response_tokens=response,
        micro_batch_tokens=spec.micro_batch_tokens,
        devices=devices,
        writer=writer,
        servers=max(len(spec.engine.urls), 1) if spec.engine else 0,
        adapter_alone=spec.engine is not None and spec.engine.weights == "lora",
        rows_at_once=ROWS,
        chunk_rows=rows,
        chunk_copies=copies_of(method),
        scoring_rows=rows,
    )
    return work, [*notes, *more]


def copies_of(method: Any) -> int:
    """The tensors of a loss's chunk on a GPU: both models' logits, and without a closed form three more."""
    from opd.maths.closed_forms import closed_form
    from opd.pieces.signals import divergence_of

    if method.support.kind not in ("full", "units"):
        return 1
    return 2 if closed_form(divergence_of(method.signal)) is not None else 5


def student_of(recipe: Recipe, spec: StageSpec, prepared: Prepared, known: dict[str, Known]) -> Student:
    """The stage's student: its shape, what is trained, and the width of its weights in bytes."""
    from opd.pieces.needs import Input

    own, one = recipe.models[spec.train], known_of(recipe, spec.train, known)
    trained = one.shape.parameters
    if own.lora is not None:
        chosen = [(rows, columns) for name, rows, columns in one.matrices if _targeted(name, own.lora.target_modules)]
        trained = lora_parameters(chosen, own.lora.rank)
    return Student(
        shape=one.shape,
        **_widths(own),
        trained=trained,
        lora=own.lora is not None,
        autocast=own.autocast,
        checkpointing=own.gradient_checkpointing,
        copies=int(Input.WEIGHT_COPY in prepared.method.needs),
        moments=_moments(spec, own, one.shape),
    )


def teachers_of(
    recipe: Recipe, spec: StageSpec, prepared: Prepared, known: dict[str, Known]
) -> tuple[TeacherModel, ...]:
    """The models that score: the student or a copy of it, or others, here or on servers."""
    kind, own = prepared.method.teacher.kind, recipe.models[spec.train]
    found: list[TeacherModel] = []
    if kind.startswith("self"):
        base = kind == "self_frozen" and own.lora is not None
        place = "student" if kind == "self_live" or base else "average" if kind == "self_ema" else "here"
        shape = known_of(recipe, spec.train, known).shape
        found.append(TeacherModel(name=spec.train, place=place, shape=shape, **_widths(own)))
    for name in spec.scoring:
        model = recipe.models[name]
        if model.local:
            shape, place = known_of(recipe, name, known).shape, "offloaded" if model.offload else "here"
            found.append(TeacherModel(name=name, place=place, shape=shape, **_widths(model)))
        elif model.server is not None:
            found.append(TeacherModel(name=name, place="servers", shape=None, width=BFLOAT16))
    return tuple(found)


def _widths(model: ModelSpec) -> dict[str, Any]:
    """Bytes of a weight outside of the layers and inside."""
    from opd.models.quantised import bytes_per_weight

    inside = None if model.quantization is None else bytes_per_weight(model.quantization)
    return {"width": WIDTHS[model.dtype], "layer_width": inside}


def _moments(spec: StageSpec, model: ModelSpec, shape: Shape) -> float | None:
    """Bytes of the optimiser per trained parameter; None for AdamW. An adapter has matrices alone."""
    width = WIDTHS[model.dtype]
    if spec.optimizer.name == "adamw_8bit":
        return 2 * (1 + FLOAT32 / BLOCK_8BIT)
    if spec.optimizer.name == "muon":
        return width if model.lora is not None else muon_moments(shape, width)
    return None


def known_of(recipe: Recipe, name: str, known: dict[str, Known]) -> Known:
    """A model's shape from its config. Raises ConfigError if the config cannot be read or built without weights."""
    from opd.models.preview import known_config, tokenizer_of, without_weights

    if name not in known:
        origin = origin_of(recipe, name)
        config = known_config(origin, name, tokenizer_of(origin, name) if origin.init is not None else None)
        model = None if config is None else without_weights(config, trust_remote_code=origin.trust_remote_code)
        if config is None or model is None:
            raise ConfigError(
                f"models.{name}: its config cannot be read before it is loaded, so its size is not known "
                f"({_origin(origin)}). Download the model, or convert it by `opd train`, and plan again."
            )
        known[name] = shape_of(config.get_text_config(), model)
    return known[name]


def shape_of(config: Any, model: nn.Module) -> Known:
    """The shape of a transformers config and the model built from it without storage."""
    sizes: Mapping[str, Any] = config.to_dict()
    hidden, heads = int(sizes["hidden_size"]), int(sizes["num_attention_heads"])
    experts = int(sizes.get("num_experts") or sizes.get("num_local_experts") or 0)
    names = dict(model.named_parameters())  # a tied output layer once
    layers = int(sizes["num_hidden_layers"])
    biases = sum(p.numel() for name, p in names.items() if name.endswith(".bias") and ".layers." in name)
    shape = Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=int(sizes.get("num_key_value_heads") or heads),
        head_dim=int(sizes.get("head_dim") or hidden // heads),
        intermediate=int((sizes.get("moe_intermediate_size") if experts else None) or sizes["intermediate_size"]),
        vocabulary=int(sizes["vocab_size"]),
        tied=bool(sizes.get("tie_word_embeddings")),
        experts=experts,
        experts_per_token=int(sizes.get("num_experts_per_tok") or 0),
        head_norms=any(name.endswith("q_norm.weight") for name in names),
        biases=biases // layers,
    )
    extra = sum(p.numel() for p in names.values()) - shape.parameters
    output = model.get_output_embeddings()  # type: ignore[operator]
    linear: list[tuple[str, Any]] = [(name, one) for name, one in model.named_modules() if one is not output]
    matrices = [(name, *_size(one)) for name, one in linear if type(one).__name__ == "Linear"]
    note = None
    if extra:
        note = f"{extra:,} parameters are not those of Llama's layers: activations and cache are counted as Llama's"
    return Known(shape=replace(shape, extra=extra), matrices=matrices, note=note)


def _size(layer: Any) -> tuple[int, int]:
    """[out, in] of a linear layer."""
    return int(layer.weight.shape[0]), int(layer.weight.shape[1])


def longest_prompt(recipe: Recipe, spec: StageSpec, prepared: Prepared, lengths: Lengths) -> tuple[int, list[str]]:
    """(tokens of the longest of the first prompts, notes). Raises ConfigError without a tokenizer or a given length."""
    from opd.models.preview import tokenizer_of
    from opd.models.render import render
    from opd.pieces.contexts import same_prompt

    notes = [] if prepared.method.context is same_prompt() or lengths.context else [CONTEXT]
    if lengths.prompt:
        return lengths.prompt, notes
    origin = origin_of(recipe, spec.train)
    tokenizer = tokenizer_of(origin, spec.train)
    if tokenizer is None:
        raise ConfigError(
            f"models.{spec.train}: its tokenizer is not known yet, so prompts cannot be counted. Give --prompt-tokens."
        )
    prompts: list[Prompt] = [prompt for task in prepared.tasks.values() for prompt in task.prompts[:PROMPTS]]
    return max(len(render(prompt, tokenizer, origin.template_options)) for prompt in prompts), notes


CONTEXT = "the teacher's context is counted as long as the prompt: give --context-tokens (`opd check` shows one)"


def _targeted(name: str, targets: str | list[str]) -> bool:
    """Whether LoRA adapts the module, as in `models.lora_targets.check_targets`."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in targets)


def _origin(spec: ModelSpec) -> str:
    return str(spec.path or spec.scorer or spec.from_stage)
