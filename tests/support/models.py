"""Tiny models built from configs, tokenizers made here, and one step of training through the library's own path."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opd.loss.collate import collate
from opd.loss.step import PhaseA, gradient, scored, written
from opd.method import Method
from opd.models import wrapping
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.pieces.contexts import same_prompt
from opd.pieces.needs import Reads, needs_of
from opd.pieces.signals import nll
from opd.samplers.authors import TeacherAuthor
from opd.samplers.hf import TransformersSampler
from opd.samplers.writers import ReferenceWriter, TeacherWriter
from opd.teachers.cross_tokenizer import teacher_by_rule
from opd.teachers.incremental import scoring_along
from opd.teachers.local import with_record
from opd.teachers.routed import RoutedTeacher
from opd.teachers.with_base import WithBase, base_teacher
from opd.types import Batch, Denominator, NoTeacher, Prompt, Record, Rollout, Sampling, Scores, Teacher, Writers

# Where the models under test are; references are computed on the CPU. `OPD_TEST_DEVICE=cuda` tries the GPU paths.
DEVICE = torch.device(os.environ.get("OPD_TEST_DEVICE", "cpu"))
LETTERS = "abcdefgh"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# model_type and what makes each family's head its own: tied or not, a bias, a soft cap, a factor on the logits.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "llama_tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "num_key_value_heads": 1,
        "head_dim": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": None,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "tie_word_embeddings": True,
    },
    "cohere": {"model_type": "cohere", "num_key_value_heads": 2, "logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"model_type": "granite", "num_key_value_heads": 2, "logits_scaling": 4.0},
    "gpt2": {"model_type": "gpt2"},
    "phi": {"model_type": "phi", "resid_pdrop": 0.0},
}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


# --- tokenizers and models ------------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """One token a byte, after <pad>, <eos>, <system>, <user> and <assistant>, with a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(
    family: str = "llama",
    tokenizer: Any = None,
    *,
    seed: int = 0,
    hidden: int = 16,
    layers: int = 2,
    padding_rows: int = 0,
    spread: float = 0.4,
    **settings: Any,
) -> nn.Module:
    """A transformers model with random weights of standard deviation `spread`: its distributions are far from uniform.

    `padding_rows` is the number of rows of the head beyond the tokenizer's vocabulary.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer or character_tokenizer(LETTERS)
    common = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": spread,
    }
    family_settings = dict(FAMILIES[family])
    model_type = family_settings.pop("model_type")
    if model_type == "gpt2":
        common = {GPT2_NAMES.get(name, name): value for name, value in common.items()}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    merged = {"vocab_size": len(tokenizer) + padding_rows, **ids, **common, **family_settings, **settings}
    config = AutoConfig.for_model(model_type, **merged)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        head = model.get_output_embeddings()
        if head.bias is not None:
            nn.init.normal_(head.bias, std=1.0)
    return model.eval().to(DEVICE)


def tiny(family: str = "llama", tokenizer: Any = None, *, name: str = "model", **settings: Any) -> LanguageModel:
    """`build`, wrapped as the library wraps it; without a `tokenizer`, that of LETTERS."""
    if tokenizer is not None:
        return wrapping.wrap(build(family, tokenizer, **settings), tokenizer, name=name)
    return copy.deepcopy(_tiny(family, name, **settings))


@functools.cache
def _tiny(family: str, name: str, **settings: Any) -> LanguageModel:
    """Made once per process: making it takes ten times as long as copying it."""
    tokenizer = character_tokenizer(LETTERS)
    return wrapping.wrap(build(family, tokenizer, **settings), tokenizer, name=name)


def bigram(tokenizer: Any = None, *, seed: int = 0, hidden: int = 16, spread: float = 0.5) -> LanguageModel:
    """A model whose next token depends on the last one alone: attention and MLP add nothing, and do not train."""
    lm = tiny("llama", tokenizer, seed=seed, hidden=hidden, layers=1, spread=spread)
    for name, parameter in lm.model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        if ".layers." in name or name.endswith("model.norm.weight"):
            parameter.requires_grad_(False)
    return lm


def chain(text: str, tokenizer: Any = None) -> LanguageModel:
    """A model that says `text` after its first character, almost surely: each character (once) leads to the next.

    After the last one comes the end of sequence.
    """
    tokenizer = tokenizer or character_tokenizer(LETTERS)
    lm = bigram(tokenizer, hidden=4 * math.ceil(len(tokenizer) / 4))
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids), "each token of a chain has one successor"
    with torch.no_grad():
        embedding, head = lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight
        nn.init.eye_(embedding)
        nn.init.zeros_(head)
        for token, successor in itertools.pairwise(ids):
            head[successor, token] = 30.0
    return lm


def parameters_of(lm: LanguageModel) -> dict[str, Tensor]:
    """Copies of all parameters, by name."""
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def double(lm: LanguageModel) -> nn.Module:
    """The transformers model in float64, to compute references with."""
    return copy.deepcopy(lm.causal_lm).cpu().double().eval()


def full_logits(model: nn.Module, prompt_ids: Sequence[int], response_ids: Tensor, vocabulary: int) -> Tensor:
    """The model's own logits [T, V] at the response's tokens, of one unpadded row without a cache."""
    row = torch.tensor([[*prompt_ids, *response_ids.tolist()]], device=next(model.parameters()).device)
    logits = model(input_ids=row, use_cache=False).logits[0, :, :vocabulary].cpu()
    return logits[len(prompt_ids) - 1 : len(prompt_ids) - 1 + len(response_ids)]


# --- prompts and responses ------------------------------------------------------------------------------------------


def prompts_of(*texts: str, **columns: Any) -> list[Prompt]:
    return [Prompt(id=i, content=text, **columns) for i, text in enumerate(texts)]


def rollout_of(
    lm: LanguageModel,
    prompt: Prompt,
    response_ids: Sequence[int],
    *,
    trained: Sequence[bool] | None = None,
    sample: int = 0,
    **columns: Any,
) -> Rollout:
    """A response that is written by the test."""
    from opd.models.render import render

    n = len(response_ids)
    return Rollout(
        prompt=prompt,
        sample=sample,
        prompt_ids=tuple(render(prompt, lm.tokenizer, lm.template_options)),
        response_ids=torch.tensor(response_ids),
        trained=torch.tensor([True] * n if trained is None else trained),
        turn=torch.zeros(n, dtype=torch.long),
        finished=True,
        text=lm.tokenizer.decode(response_ids),
        **columns,
    )


def writers_of(student: LanguageModel, external: LanguageModel | None, sampling: Sampling) -> Writers:
    teacher = author = None
    if external is not None:
        teacher = TeacherWriter(teacher=external, student=student, sampling=sampling, context=same_prompt())
        author = TeacherAuthor(name="teacher", teacher=external, student=student, sampling={None: sampling})

    def complete(rollouts: Sequence[Rollout], record: Record) -> list[Rollout]:
        temperature = sampling.temperature or 1.0
        return with_record(student, rollouts, record, temperature=lambda rollout: temperature, micro_batch_tokens=10**6)

    return Writers(
        student=TransformersSampler(lm=student, sampling=sampling),
        reference=ReferenceWriter(student=student),
        complete=complete,
        teacher=teacher,
        authors={None: author} if author is not None else {},
    )


def write(
    method: Method,
    student: LanguageModel,
    external: LanguageModel | None,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: tuple[int, int] = (0, 0),
) -> list[Rollout]:
    """The method's source, with a reward that differs between responses (a method may not look), and what it keeps.

    Of a method with peers, the last prompt is a peer's.
    """
    if method.teacher.kind == "peer":
        prompts = [*prompts[:-1], replace(prompts[-1], teacher_id=PEER)]
    method = method.with_tokenizer(student.tokenizer)
    writers = writers_of(student, external, sampling)
    if external is not None or method.teacher.kind not in ("external", "peer"):
        teacher = teacher_of(method, student, external)
        scorer = scoring_along(teacher, method.context, method.request())
        writers = replace(writers, scorer=scorer, memory=method.make_memory())

    def reward(rollouts: Sequence[Rollout]) -> list[Rollout]:
        values = (sum((t + 1) * v for t, v in enumerate(r.response_ids.tolist())) % 11 / 10 for r in rollouts)
        return [replace(r, reward=value) for r, value in zip(rollouts, values, strict=True)]

    return written(method, prompts, writers, reward, seed)


def sampler(lm: LanguageModel, **sampling: Any) -> TransformersSampler:
    """At most 12 tokens a response."""
    return TransformersSampler(lm=lm, sampling=Sampling(**{"max_completion_length": 12, **sampling}))


def policy(lm: LanguageModel, rollout: Rollout) -> Tensor:
    """The model's own log-probs [T, V] in float64, teacher-forced."""
    with torch.no_grad():
        logits = full_logits(double(lm), rollout.prompt_ids, rollout.response_ids, lm.vocabulary)
    assert rollout.sampling is not None
    return (logits / (rollout.sampling.temperature or 1.0)).log_softmax(-1)


def same(a: Rollout, b: Rollout) -> bool:
    """The same tokens with the same log-probs, up to the rounding of another batch."""
    assert a.policy_logp is not None
    assert b.policy_logp is not None
    close = torch.allclose(a.policy_logp, b.policy_logp, atol=1e-5)
    return a.response_ids.tolist() == b.response_ids.tolist() and a.finished == b.finished and close


def said(*pieces: Any) -> set[str]:
    """What pieces declare, as text; numbers apart."""
    needs = needs_of(*pieces)
    return {*needs.columns, *needs.inputs, *needs.batch, *needs.traits}


# --- one step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """A step's loss, and its gradient by parameter."""

    loss: float
    grads: Mapping[str, Tensor]

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.grads.values()))

    def distance(self, other: Gradient) -> float:
        """Norm of the difference, relative to the larger of the two gradients."""
        assert self.grads.keys() == other.grads.keys()
        square = sum(float((g.double() - other.grads[n].double()).square().sum()) for n, g in self.grads.items())
        return math.sqrt(square) / max(self.norm, other.norm, 1e-30)

    def same_bits(self, other: Gradient) -> bool:
        """On a GPU, where sums of many threads have no fixed order, the same up to rounding."""
        if DEVICE.type != "cpu":
            return abs(self.loss - other.loss) <= 1e-6 * (1 + abs(other.loss)) and self.distance(other) < 1e-5
        same = all(torch.equal(g, other.grads[name]) for name, g in self.grads.items())
        return self.loss == other.loss and self.grads.keys() == other.grads.keys() and same


PEER = "peer"  # the name of another model that the stage trains


def teacher_of(
    method: Method, student: LanguageModel, external: LanguageModel | None, micro_batch_tokens: int = 64
) -> Teacher:
    """The teacher by the method's rule; for a method of three models beside a base, a flatter copy of the student."""
    teacher = teacher_by_rule(method.teacher, student, external, micro_batch_tokens=micro_batch_tokens)
    if method.teacher.kind == "peer":
        return RoutedTeacher(teachers={PEER: teacher}, otherwise=NoTeacher())
    if Reads.BASE_LOGP not in method.needs:
        return teacher
    third = replace(student, model=copy.deepcopy(student.model), name="base")  # shares no frozen weight either
    with torch.no_grad():
        for parameter in third.model.parameters():
            parameter.mul_(0.8)
    return WithBase(teacher=teacher, third=base_teacher(student, third, micro_batch_tokens=micro_batch_tokens))


def unscored(rollouts: Sequence[Rollout]) -> list[Scores]:
    """Scores without a teacher: NaN."""
    return NoTeacher().score(rollouts, [rollout.prompt for rollout in rollouts], Method(signal=nll()).request())


def batch_of(method: Method, student: LanguageModel, teacher: Teacher, rollouts: list[Rollout]) -> Batch:
    """Phase A without its end: context, scores, padding. Of the method's own rows."""
    rollouts = [rollout for rollout in rollouts if not rollout.part]
    wanted = replace(method.request(shown=True), entropy=method.request().entropy)
    scores = teacher.score(rollouts, method.context(rollouts), wanted)
    return replace(collate(rollouts, scores, student.device), memory=method.make_memory())


def gradient_of(
    method: Method,
    student: LanguageModel,
    teacher: Teacher,
    batch: Batch,
    denominator: Denominator,
    micro_batch_tokens: int = 10**6,
    parts: Mapping[str, PhaseA] | None = None,
) -> Gradient:
    """Phase B of a batch whose credit and weight are attached."""
    phase_a = PhaseA(
        batch=batch,
        contexts=(),
        denominator=denominator,
        count=denominator.count,
        trains=True,
        learned={},
        parts=parts or {},
    )
    student.model.zero_grad(set_to_none=True)
    loss, _ = gradient(method, student, teacher, phase_a, micro_batch_tokens=micro_batch_tokens)
    grads = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()).cpu()
        for name, p in student.trainable().items()
    }
    student.model.zero_grad(set_to_none=True)
    return Gradient(loss=loss, grads=grads)


def scored_rows(method: Method, trained: Sequence[Sequence[bool]]) -> Batch:
    """A batch with one response per row of `trained`, scored by another model; log p rises along each."""
    student, external = tiny(name="student"), tiny(seed=1, hidden=24, name="teacher")
    rollouts = [
        rollout_of(
            student,
            Prompt(id=i, content="ab"),
            [2 + (3 * i + t) % 8 for t in range(len(own))],
            trained=own,
            policy_logp=torch.linspace(-3, -1, len(own)),
        )
        for i, own in enumerate(trained)
    ]
    return batch_of(method, student, teacher_of(method, student, external), rollouts)


def step(
    method: Method,
    student: LanguageModel,
    teacher: Teacher,
    rollouts: list[Rollout],
    micro_batch_tokens: int = 10**6,
) -> Gradient:
    """Scores, batch, credit, denominator, micro-batches, loss, gradient: the loop's lines 3 to 8."""
    contexts = method.context(rollouts)
    phase_a = scored(method, teacher, rollouts, contexts, method.request(shown=True), device=student.device)
    return gradient_of(method, student, teacher, phase_a.batch, phase_a.denominator, micro_batch_tokens, phase_a.parts)
