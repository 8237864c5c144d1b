"""Sources: the writers of the responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from opd.errors import ConfigError
from opd.pieces.needs import Input, Needs, Piece, Trait, needing, needs_of
from opd.plugins import np
from opd.types import Prompt, Record, Rollout, Source, Watch, Writers


@cache
def on_policy(watch: Watch | None = None) -> Source:
    """The student, with this step's weights; `watch` may end responses during sampling."""

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], record: Record) -> list[Rollout]:
        stop = None if watch is None else watch(writers)
        return writers.student(prompts, seed=seed, record=record, stop=stop)

    return Piece(source, Needs() if watch is None else needs_of(watch))


@cache
def dataset() -> Source:
    """The data's `response` column."""

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], record: Record) -> list[Rollout]:
        return writers.reference(prompts, seed=seed)

    return needing(source, Trait.OFF_POLICY, columns=["response"])


def teacher_writes() -> Source:
    """The teacher: sequence-level distillation (arXiv 1606.07947)."""

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], record: Record) -> list[Rollout]:
        assert writers.teacher is not None, "recipes without a teacher model are refused earlier"
        return writers.teacher(prompts, seed=seed)

    return needing(source, Input.TEACHER_MODEL, Trait.OFF_POLICY)


def drafted(
    writers: Writers,
    prompts: Sequence[Prompt],
    seed: tuple[int, int],
    *,
    contexts: Sequence[Prompt] | None = None,
    n: int = 1,
    first: int = 0,
) -> list[Rollout]:
    """`n` responses to each prompt, each by the prompt's own teacher, in the order of the prompts.

    The arguments are those of `types.Author`. A source that calls this declares Input.TEACHER_MODEL.
    """
    shown = prompts if contexts is None else contexts

    def by_author(name: str | None, own: list[int]) -> list[Rollout]:
        """The responses of one author to the prompts at these places."""
        assert name in writers.authors, "recipes without a teacher that writes are refused earlier"
        author = writers.authors[name]
        return author([prompts[i] for i in own], seed=seed, contexts=[shown[i] for i in own], n=n, first=first)

    return in_order([prompt.teacher_id for prompt in prompts], by_author)


def in_order(owners: Sequence[str | None], write: Callable[[str | None, list[int]], list[Rollout]]) -> list[Rollout]:
    """`write(owner, its places)` for each owner of a place; the responses in the order of the places.

    A call returns equally many responses to each place, those of one place side by side.
    """
    places: dict[str | None, list[int]] = {}
    for i, owner in enumerate(owners):
        places.setdefault(owner, []).append(i)
    found: dict[int, list[Rollout]] = {}
    for owner, own in places.items():
        responses = write(owner, own)
        each = len(responses) // len(own)
        assert each * len(own) == len(responses), f"{len(responses)} responses to {len(own)} prompts"
        found |= {at: responses[k * each : (k + 1) * each] for k, at in enumerate(own)}
    return [rollout for i in range(len(owners)) for rollout in found[i]]


def mixture(on_policy_share: float, other: Source) -> Source:
    """In each step the student with probability `on_policy_share`, else the other source.

    GKD, arXiv 2306.13649 alg. 1. The choice depends on (seed, step). Raises ConfigError for a share outside [0, 1].
    """
    if not 0.0 <= on_policy_share <= 1.0:
        raise ConfigError(f"`on_policy_share` is a probability between 0 and 1, got {on_policy_share}.")
    student = on_policy()

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], record: Record) -> list[Rollout]:
        coin = np.random.default_rng((*seed, 0xC01)).random()
        chosen = student if coin < on_policy_share else other
        return chosen(prompts, writers, seed, record)

    others = (other,) if on_policy_share < 1 else ()
    return Piece(source, needs_of(*others) | Needs(student_writes=on_policy_share > 0))
