"""What a stage needs that can be made without weights: method, prompts, rewards, held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from opd import methods
from opd.check import check_diagnostics, check_needs, check_pass_at
from opd.data import DataSpec, load_prompts, require_columns
from opd.evaluate import HeldOut
from opd.method import Method
from opd.models import LanguageModel
from opd.recipe import DataSection, RewardSection, SamplingSection, StageSpec
from opd.rewards import RewardFn, load_reward
from opd.types import Prompt, Sampling, needs_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a Python caller hands over instead of naming it in the recipe."""

    models: Mapping[str, LanguageModel] = field(default_factory=dict[str, LanguageModel])
    prompts: list[Prompt] | None = None
    reward: RewardFn | None = None
    method: Method | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a stage needs and can be made without weights."""

    method: Method
    prompts: list[Prompt]
    reward: RewardFn | None
    held_out: HeldOut | None

    @property
    def all_prompts(self) -> list[Prompt]:
        return [*self.prompts, *(self.held_out.prompts if self.held_out is not None else ())]


def prepare(spec: StageSpec, given: Given, seed: int) -> Prepared:
    """Method, data and rewards of a stage, checked against each other. Raises ConfigError or DataError."""
    method = given.method or methods.build(spec.method, spec.options)
    check_needs(spec, method, has_reward=spec.reward is not None or given.reward is not None)
    check_diagnostics(spec, method)
    reward = given.reward or reward_of(spec.reward)
    columns = {"response", "privileged_context"} & method.needs()
    prompts = read(spec.data, columns | needs_of_reward(reward), given.prompts)
    held_out = None
    if spec.evaluate is not None:
        check_pass_at(spec)
        judged_by = reward_of(spec.evaluate.reward) or reward
        read_by_teacher = needs_of(method.context) if spec.evaluate.teacher or spec.evaluate.kl else frozenset[str]()
        held_out = HeldOut(
            prompts=read(spec.evaluate.data, needs_of_reward(judged_by) | read_by_teacher),
            sampling={name: sampling_of(s) for name, s in spec.evaluate.sampling.items()},
            reward=judged_by,
            seed=seed,
            pass_at=spec.evaluate.pass_at,
            max_prompt_length=spec.max_prompt_length,
        )
    return Prepared(method=method, prompts=prompts, reward=reward, held_out=held_out)


def read(section: DataSection, require: Iterable[str], given: list[Prompt] | None = None) -> list[Prompt]:
    """The prompts of a data section, or those given in Python; every row has the columns that somebody will read."""
    if given is None:
        return load_prompts(data_spec(section), require=sorted(require))
    require_columns(given, sorted(require), source="the prompts given in Python")
    return given


def needs_of_reward(reward: RewardFn | None) -> frozenset[str]:
    return frozenset() if reward is None else needs_of(reward)


def data_spec(section: DataSection) -> DataSpec:
    return DataSpec(**section.model_dump())


def sampling_of(section: SamplingSection) -> Sampling:
    return Sampling(**{**section.model_dump(), "stop": tuple(section.stop)})


def reward_of(section: RewardSection | None) -> RewardFn | None:
    return None if section is None else load_reward(section.name, section.options)
