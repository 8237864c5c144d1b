"""Responses of a teacher on servers, for an evaluation: as rollouts of a student that reads only the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd.engines.replicas import Job, Replicas
from opd.engines.vllm import Drawn, draw_fields, parse_drawn, sampling_fields, seed_of
from opd.errors import TeacherError
from opd.messages import text_after
from opd.models.language_model import LanguageModel
from opd.models.processors import refuse_images
from opd.models.render import render, render_checked
from opd.types import Context, Prompt, Rollout, Sampling, Writer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedWriter(Writer):
    """Responses of a served teacher that reads `context`; the servers need `--enable-scale-out`.

    They have no `sampler_logp`, because the student did not write them. A response ends with a token that ends the
    student's: another end token of the teacher is replaced. `model`: the servers' name of it. `tokenizer` renders what
    the teacher reads; its ids are the student's.
    """

    name: str
    replicas: Replicas
    model: str
    tokenizer: Any
    template_options: dict[str, Any]
    student: LanguageModel
    sampling: Sampling
    context: Context
    max_prompt_length: int | None = None

    def __call__(self, prompts: Sequence[Prompt], *, seed: tuple[int, int]) -> list[Rollout]:
        """`sampling.n` responses to each prompt, in order.

        Raises DataError for a prompt that is too long, TeacherError for a response that no server gave.
        """
        refuse_images(prompts, f"The served teacher {self.name!r}")
        student = self.student
        read = render_checked(
            prompts,
            student.tokenizer,
            max_prompt_length=self.max_prompt_length,
            template_options=student.template_options,
        )
        bare = [self._rollout(prompt, (), 0, Drawn(ids=[], logp=[], finished=True, versions=[])) for prompt in prompts]
        contexts = [render(one, self.tokenizer, self.template_options) for one in self.context(bare)]
        rows = [(i, sample) for i in range(len(prompts)) for sample in range(self.sampling.n)]
        jobs = [self._job(contexts[i], seed_of((*seed, 0), prompts[i].id, sample)) for i, sample in rows]
        written: list[Rollout] = []
        for (i, sample), answer in zip(rows, self.replicas.answers(jobs), strict=True):
            if answer.value is None:
                raise TeacherError(
                    f"No server of the teacher {self.name!r} wrote a response to prompt {prompts[i].id} of an "
                    f"evaluation: {answer.failure}. Start the servers with --enable-scale-out, or set "
                    "evaluate.teacher to false."
                )
            written.append(self._rollout(prompts[i], read[i], sample, answer.value))
        student.check_ids(read, [rollout.response_ids.tolist() for rollout in written])
        return written

    def _job(self, ids: Sequence[int], seed: int) -> Job[Drawn]:
        stop = self.student.stop_ids
        params = sampling_fields(self.sampling, self.sampling.max_completion_length, stop) | {"ignore_eos": False}
        return Job(
            path="inference/v1/generate",
            fields=draw_fields(self.model, ids, params, seed=seed, salt="opd-teacher"),
            read=parse_drawn,
            tokens=len(ids) + self.sampling.max_completion_length,
            group=tuple(ids),
        )

    def _rollout(self, prompt: Prompt, prompt_ids: Sequence[int], sample: int, drawn: Drawn) -> Rollout:
        ids, special = list(drawn.ids), self.student.tokenizer.added_tokens_decoder
        text = text_after(prompt_ids, ids[:-1] if ids and ids[-1] in special else ids, self.student.tokenizer)
        end = self.student.endings.after(prompt)
        if drawn.finished and ids and end is not None and ids[-1] in special and ids[-1] not in self.student.stop_ids:
            ids[-1] = end
        return Rollout(
            prompt=prompt,
            sample=sample,
            prompt_ids=tuple(prompt_ids),
            response_ids=torch.tensor(ids, dtype=torch.long),
            trained=torch.ones(len(ids), dtype=torch.bool),
            turn=torch.zeros(len(ids), dtype=torch.long),
            finished=drawn.finished,
            text=text,
        )
