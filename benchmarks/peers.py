"""TRL's two on-policy distillation trainers, set up for the step benchmark.

Both train through their own `Trainer.train()`; a callback waits before each step for a request, and answers after it.
Their own methods are timed in place. The settings, and why:

* float32 on the CPU, bfloat16 autocast over float32 weights on a GPU; one batch of all prompts, no gradient
  checkpointing (TRL turns it on; it costs time);
* temperature 1, top-p 1, top-k off, reverse KL (`beta=1.0`), fully on-policy (`lmbda=1.0` in GKD);
* `DistillationTrainer` with its chunked divergence, its only loss, which TRL recommends over GKD; `trl_tuned` is the
  same trainer after `trl_tiles.set_tiles`;
* GKD divides by the number of labels in the dataset, not in the responses: its dummy completions are as long as the
  responses, so that the denominators agree;
* no stop tokens, as on every side: all responses have the full length;
* no logging, saving or reporting while a step is timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ON_GPU, Channel, PeakMemory, Record, timed, wait_for_device
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from opd.types import Prompt

UNREACHABLE = -1  # a stop token that no vocabulary has


def arguments(batch: int, learning_rate: float, exact: bool) -> Record:
    """The arguments of both trainers; otherwise their defaults. `exact`: float32 on a GPU, too."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="opd-benchmark-"),
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU and not exact,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": 10_000,
        "temperature": 1.0,
        "beta": 1.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def distillation_trainer(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    new_tokens: int,
    learning_rate: float,
    exact: bool = False,
) -> Any:
    """`DistillationTrainer` over these prompts, in their order."""
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt.content} for prompt in prompts]),
        args=DistillationConfig(
            **arguments(len(prompts), learning_rate, exact), max_completion_length=new_tokens, shuffle_dataset=False
        ),
    )
    trainer.eos_token_ids = [UNREACHABLE]
    _never_stop(trainer)
    return trainer


def gkd_trainer(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    new_tokens: int,
    learning_rate: float,
    exact: bool = False,
) -> Any:
    """`GKDTrainer`; the dataset's completions are dummies that fix the denominator and are never trained on."""
    rows: list[Record] = []
    for prompt in prompts:
        ids = tokenizer(prompt.content).input_ids
        mask = [0] * len(ids) + [1] * new_tokens
        rows.append({"prompt": prompt.content, "input_ids": ids + [1] * new_tokens, "completion_mask": mask})
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=GKDConfig(**arguments(len(prompts), learning_rate, exact), max_new_tokens=new_tokens, lmbda=1.0),
    )
    _never_stop(trainer)
    return trainer


def _never_stop(trainer: Any) -> None:
    trainer.generation_config.eos_token_id = None
    trainer.generation_kwargs["eos_token_id"] = None
    trainer.model.generation_config.eos_token_id = None


class Gate(TrainerCallback):
    """Holds `train()` before each step until a request comes, and answers after it."""

    def __init__(self, channel: Channel, parts: Record) -> None:
        self.channel = channel
        self.parts = parts
        self.memory: PeakMemory | None = None
        self.started = self.started_cpu = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.memory is None:
            self.channel.send({"ready": True})
        self.channel.receive()
        self.memory = self.memory or PeakMemory()
        self.parts.clear()
        wait_for_device()
        self.started, self.started_cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_device()
        total, cpu = time.perf_counter() - self.started, time.process_time() - self.started_cpu
        assert self.memory is not None
        answer = {"total": total, "total_cpu": cpu, "peak_bytes": self.memory.above_start()}
        self.channel.send({**self.parts, **answer})


def run(trainer: Any, generate_method: str) -> None:
    """Train one step per request, without end. `generate_method`: the trainer's method that samples responses."""
    parts: Record = {}
    setattr(trainer, generate_method, _timing(getattr(trainer, generate_method), parts, "generate"))
    trainer.compute_loss = _timing(trainer.compute_loss, parts, "loss")
    trainer.accelerator.backward = _timing(trainer.accelerator.backward, parts, "backward")
    trainer.add_callback(Gate(Channel(), parts))
    trainer.train()


def _timing(function: Callable[..., Any], parts: Record, name: str) -> Callable[..., Any]:
    """The function, timed into parts[name]; also records the loss or the response."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with timed(parts, name):
            out = function(*args, **kwargs)
        if name == "loss":
            parts["loss_value"] = float(out.detach())
        return out

    return call


def check_side(name: str) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """A trainer's builder and its loss of given sequences, by the name of the contestant."""
    return (gkd_trainer, gkd_loss) if name == "trl_gkd" else (distillation_trainer, distillation_loss)


def distillation_loss(trainer: Any, ids: Tensor, prompt_tokens: int) -> Tensor:
    """`DistillationTrainer`'s loss of given sequences [b, L], all of the same lengths."""
    prompt, response = ids[:, :prompt_tokens], ids[:, prompt_tokens:]
    trainer.model.train()
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": response,
        "completion_mask": torch.ones_like(response),
        "num_items_in_batch": torch.tensor(response.numel()),
    }
    return trainer.compute_loss(trainer.model, inputs)


def gkd_loss(trainer: Any, ids: Tensor, prompt_tokens: int) -> Tensor:
    """`GKDTrainer`'s loss of given sequences [b, L], all of the same lengths."""
    labels = ids.clone()
    labels[:, :prompt_tokens] = -100
    trainer.model.train()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return trainer.compute_loss(trainer.model, inputs, num_items_in_batch=int((labels != -100).sum()))
