"""The responses of an evaluation that has not ended, in files, so that a stopped run does not sample them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd.files import write_atomically
from opd.parallel import World
from opd.types import Prompt, Rollout, Sampling, Talk

REWARD = ("reward", "unjudged", "reward_failure")  # fields of a rollout


@dataclass(frozen=True, slots=True)
class KeptResponses:
    """The files of one stage: one for each evaluation, task and sampling setting. The main process writes."""

    folder: Path
    world: World

    def read(self, name: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout] | None:
        """The responses that are kept under `name`, on every process; None if there are none."""
        file = self.folder / f"{name}.json"
        found = json.loads(file.read_bytes()) if self.world.main and file.exists() else None
        rows = self.world.gather(found)[0]
        if rows is None:
            return None
        by_id = {prompt.id: prompt for prompt in prompts}
        return [rollout_of(row, by_id[row["prompt_id"]], sampling) for row in rows]

    def write(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """Keep the responses to all prompts."""
        if self.world.main:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / f"{name}.json", json.dumps([row_of(one) for one in rollouts]))

    def clear(self, *but: str) -> None:
        """Remove the files of all evaluations but these: of one that is written, or whose weights are gone."""
        if not self.world.main or not self.folder.exists():
            return
        for file in self.folder.iterdir():
            if file.name.split(".")[0] not in but:
                file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def row_of(rollout: Rollout) -> dict[str, Any]:
    """A response as JSON, without what the student's forward pass adds (top k, entropy) and without judges' numbers."""
    logp = {name: getattr(rollout, name) for name in ("sampler_logp", "policy_logp")}
    return {
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "prompt_ids": list(rollout.prompt_ids),
        "response_ids": rollout.response_ids.tolist(),
        "trained": rollout.trained.tolist(),
        "turn": rollout.turn.tolist(),
        "finished": rollout.finished,
        "text": rollout.text,
        # A float32 number is the same after a way through Python's float and JSON.
        **{name: None if value is None else value.tolist() for name, value in logp.items()},
        "sampler_version": rollout.sampler_version,
        "sampled": rollout.sampling is not None,
        **{name: getattr(rollout, name) for name in REWARD},
        **_of_talk(rollout),
    }


def _of_talk(rollout: Rollout) -> dict[str, Any]:
    """The conversation with an environment, which may have changed the prompt; empty without one."""
    talk, prompt = rollout.talk, rollout.prompt
    if talk is None:
        return {}
    content = prompt.content if isinstance(prompt.content, str) else [dict(one) for one in prompt.content]
    kept = {"heard": talk.heard.tolist(), "last_text": talk.last_text, "turn_rewards": list(talk.turn_rewards)}
    kept["turn_errors"] = list(talk.turn_errors)
    return {"talk": {**kept, "counts": dict(talk.counts), "content": content, "tools": [dict(t) for t in prompt.tools]}}


def _talk_of(row: dict[str, Any]) -> Talk:
    return Talk(
        heard=torch.tensor(row["heard"], dtype=torch.bool),
        last_text=row["last_text"],
        turn_rewards=tuple(row["turn_rewards"]),
        turn_errors=tuple(row.get("turn_errors", ())),
        counts=row["counts"],
    )


def rollout_of(row: dict[str, Any], prompt: Prompt, sampling: Sampling) -> Rollout:
    """The response of `row_of`, to its prompt."""
    sampler_logp, policy_logp = row["sampler_logp"], row["policy_logp"]
    talk = row.get("talk")
    if talk is not None:
        content = talk["content"] if isinstance(talk["content"], str) else tuple(talk["content"])
        prompt = replace(prompt, content=content, tools=tuple(talk["tools"]))
    return Rollout(
        prompt=prompt,
        sample=row["sample"],
        prompt_ids=tuple(row["prompt_ids"]),
        response_ids=torch.tensor(row["response_ids"]),
        trained=torch.tensor(row["trained"], dtype=torch.bool),
        turn=torch.tensor(row["turn"], dtype=torch.long),
        finished=row["finished"],
        text=row["text"],
        sampler_logp=None if sampler_logp is None else torch.tensor(sampler_logp),
        policy_logp=None if policy_logp is None else torch.tensor(policy_logp),
        sampler_version=row["sampler_version"],
        sampling=sampling if row["sampled"] else None,
        **{name: row[name] for name in REWARD},
        talk=None if talk is None else _talk_of(talk),
    )
