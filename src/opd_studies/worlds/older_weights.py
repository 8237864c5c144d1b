"""Responses of the student's weights of some updates ago, in one process, and the signal that these weights recorded.

    m   the weights that wrote a response, `lag` updates before those that train on it
    p   the step's student, q the teacher; l = log m - log q, d = log p - log q, at one prefix

What asynchronous training can do with m, and its gradient with respect to the logits of p, which is descended. Those of
a sampled token are means over y ~ m:

    forward KL                              -sum_v q log p               p_j - q_j
    reverse KL, computed with p             sum_v p d                    p_j (d_j - KL(p||q))
    reverse KL, as m recorded it            sum_v sg[m l] log p          m_j l_j - p_j KL(m||q)
    the same less a baseline                the same with l - KL(m||q)   m_j (l_j - KL(m||q))
    the log-ratio computed, weighed by m    sum_v sg[m d] log p          m_j d_j - p_j sum_v m d
    sampled token, computed with p          sg[d(y)] log p(y)            m_j d_j - p_j sum_v m d
    the same, weighed by p/m                sg[p/m d](y) log p(y)        p_j (d_j - KL(p||q))

With m = p all but the first are equal. The prefixes are those of m in every row, and in the first two nothing else is
old. The third is not the gradient of `lag` updates ago, which is the fourth: it is the fourth plus
(m_j - p_j) KL(m||q). A KL is positive, so a token that became likelier since m is raised by KL(m||q) times what its
probability gained, and one that became less likely is lowered: whatever an update did, the next ones repeat it, until m
has caught up. The fifth and sixth have the same term with sum_v m d = KL(m||q) - KL(m||p) in place of KL(m||q). A
baseline, the sum subtracted from l or d, removes it. On policy it changes no mean. A cap on p/m brings a part of it
back, for tokens that became likelier by more than the cap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from opd.errors import ConfigError, TrainingError
from opd.method import Method
from opd.models.language_model import LanguageModel, frozen_copy
from opd.pieces import signals, supports
from opd.pieces.needs import Trait, needing
from opd.samplers.hf import TransformersSampler
from opd.teachers.local import LocalTeacher, with_record
from opd.types import NOTHING_MORE, Batch, EarlyStop, Prompt, Record, Rollout, Sampler, Sampling, ScoreRequest, Tokens

MICRO_BATCH_TOKENS = 8192  # of a forward: responses here have a dozen tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRollout(Rollout):
    """A response with the log-probs of all tokens under the weights that wrote it, at the sampling temperature."""

    recorded_logp: Tensor  # [T, V]


@dataclass(slots=True, kw_only=True)
class OlderWeights(Sampler):
    """Writes with the student's weights of `lag` updates ago, or of the first step if there are fewer; a `Sampler`.

    `lag` None: always with those of the first step. `sampler_logp` is of the weights that drew the tokens, and
    `policy_logp`, top k and entropy are of the step's, as `samplers.ahead` has them. `records`: also the log-probs of
    all tokens under the weights that drew (`RecordedRollout`). Copies of the weights are kept in memory alone.
    """

    student: LanguageModel
    sampling: Sampling
    lag: int | None
    records: bool
    writer: TransformersSampler = field(init=False)  # with the older weights
    kept: deque[tuple[int, dict[str, Tensor]]] = field(default_factory=deque[tuple[int, dict[str, Tensor]]], init=False)

    def __post_init__(self) -> None:
        self.writer = TransformersSampler(lm=frozen_copy(self.student), sampling=self.sampling)

    @property
    def temperature(self) -> float:
        """The temperature of `policy_logp` and of recorded log-probs."""
        return self.writer.temperature

    @torch.no_grad()
    def sync(self, version: int) -> None:
        """Keep a copy of the student's weights, and write with those of `lag` updates before.

        Raises TrainingError for a run that continues, which lacks the older weights.
        """
        if not self.kept and version != 0:
            raise TrainingError(
                f"The run continues at step {version}, and the weights of earlier updates are in no checkpoint, so "
                "the responses would be of newer weights than the recipe says. Start the run again from step 0."
            )
        if not self.kept or self.lag is not None:
            self.kept.append((version, {name: p.detach().clone() for name, p in self.student.trainable().items()}))
        while self.lag is not None and self.kept[0][0] < version - self.lag:
            self.kept.popleft()
        older, weights = self.kept[0]
        mine = dict(self.writer.lm.model.named_parameters())
        for name, value in weights.items():
            mine[name].copy_(value)
        self.writer.sync(older)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        """Responses in the order of the prompts. Raises as `TransformersSampler` does."""
        written = self.writer(prompts, seed=seed, stop=stop)
        found = with_record(
            self.student,
            written,
            record,
            temperature=lambda rollout: self.temperature,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            policy=True,
        )
        return self._recorded(found) if self.records else found

    def _recorded(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        lm = self.writer.lm
        view = LocalTeacher(lm=lm, micro_batch_tokens=MICRO_BATCH_TOKENS, student_device=lm.device)
        request = ScoreRequest(support=supports.sampled(), temperature=self.temperature, top_k=lm.vocabulary)
        out: list[Rollout] = []
        for rollout, scores in zip(rollouts, view.score(rollouts, [r.prompt for r in rollouts], request), strict=True):
            assert scores.teacher_top_ids is not None
            assert scores.teacher_top_logp is not None
            logp = torch.empty_like(scores.teacher_top_logp).scatter_(
                1, scores.teacher_top_ids, scores.teacher_top_logp
            )
            values = {one.name: getattr(rollout, one.name) for one in fields(Rollout)}
            out.append(RecordedRollout(**values, recorded_logp=logp.cpu()))
        return out


def older_weights(
    student: LanguageModel, sampling: Sampling, lag: int | None = 0, records: bool = False
) -> OlderWeights:
    """A recipe's `sampler`. Raises ConfigError for a negative lag."""
    if lag is not None and lag < 0:
        raise ConfigError(f"`lag` is a number of updates, 0 or more, or null for the first step's weights; got {lag}.")
    return OlderWeights(student=student, sampling=sampling, lag=lag, records=records)


def recorded_reverse_kl(
    log_ratio: Literal["recorded", "computed"] = "recorded",
    ratio: Literal["none", "token", "clip"] = "none",
    centred: bool = False,
    cap: float = 2.0,
    clip: float = 0.2,
) -> Method:
    """The reverse KL that the weights which wrote a response would give, on the whole vocabulary.

    a = sg[log m - log q], or with `log_ratio` "computed" sg[log p - log q]; `centred`: a - sum_v m a instead, a
    baseline. w as `ratio` says:

        none      sum_v sg[m a] log p
        token     sum_v sg[m w a] log p, w = min(cap, p/m)
        clip      sum_v m max(r a, clamp(r, 1 - clip, 1 + clip) a), r = p/m with gradient: PPO's, with the advantage -a

    L = (1/B) sum_i (1/T_i) sum_t of these: the mean over y_t ~ m of the sampled token's loss, without the noise of the
    draw. `clip` is the default of the released code of arXiv 2606.24143, with 0.2. The value is no KL; with m = p the
    gradient is that of KL(p||q). The stage's sampler must be `older_weights` with `records: true`. Raises ConfigError
    for a cap below 1 and a clip outside of 0 to 1.
    """
    if not (cap >= 1.0 and 0.0 <= clip < 1.0):
        raise ConfigError(f"`cap` bounds p/m and is at least 1, `clip` its distance from 1; got {cap} and {clip}.")

    def signal(tokens: Tokens) -> Tensor:
        assert tokens.student_support_logp is not None
        assert tokens.teacher_support_logp is not None
        m, p = tokens.advantage, tokens.student_support_logp  # [N, V]
        a = ((m if log_ratio == "recorded" else p) - tokens.teacher_support_logp).detach()
        if centred:
            a = a - (m.exp() * a).sum(-1, keepdim=True)
        if ratio == "clip":
            r = (p - m).clamp(max=signals.LARGEST_LOG_RATIO).exp()
            return (m.exp() * torch.maximum(r * a, r.clamp(1.0 - clip, 1.0 + clip) * a)).sum(-1)
        mass = m.exp() if ratio == "none" else torch.minimum(cap * m.exp(), p.exp())
        return ((mass * a).detach() * p).sum(-1)

    return Method(
        support=supports.full(),
        credit=needing(recorded_logp),
        signal=needing(signal, Trait.MINIMISES_DIVERGENCE),
    )


def recorded_logp(batch: Batch) -> Tensor:
    """[B, T, V]: log m; 0 at padding. Raises ConfigError for responses that have none."""
    rows: list[Tensor] = []
    for rollout in batch.rollouts:
        if not isinstance(rollout, RecordedRollout):
            raise ConfigError(
                "recorded_reverse_kl reads the log-probs of the weights that wrote a response, and a response has "
                "none. Set the stage's `sampler` to opd_studies.worlds.older_weights:older_weights, with "
                "`sampler_options: {records: true}`."
            )
        rows.append(rollout.recorded_logp)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(batch.mask.device)
