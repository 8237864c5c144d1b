"""What can be known to be wrong of a method by itself: pieces that pull apart, and baselines that would be biased."""

from __future__ import annotations

from opd.errors import ConfigError
from opd.method import PIECES, Method
from opd.pieces.needs import Input, Reads, Trait, needs_of
from opd.recipe.schema import SamplingSection
from opd.types import Sampling


def check_pieces(method: Method, where: str) -> None:
    """Refuse pieces that do not fit together, whatever the recipe gives. Raises ConfigError."""
    needs = method.needs
    if needs.batch & {Reads.SAMPLER_LOGP, Reads.POLICY_LOGP} and Trait.OFF_POLICY in needs:
        raise ConfigError(
            f"{where} reads the probability with which the student wrote each "
            "token, and its source is not the student. Use an on-policy source, a signal without importance ratio, or "
            "another credit."
        )
    if Trait.SAMPLED_TOKEN_LAST in needs and not method.support.with_sampled:
        raise ConfigError(
            f"{where} has a signal that takes the last token of the support for the "
            "sampled one, and the support does not add it. Build the support with top_k(k, with_sampled=True)."
        )
    if {Trait.READS_ATTEMPT, Trait.SCORES_UNFINISHED} <= needs.traits:
        raise ConfigError(
            f"{where}: the teacher reads the student's attempt, and scores it while it is "
            "being written. Use a context without the attempt, or a source that nobody watches."
        )
    if Input.TEACHER in needs and method.teacher.kind == "none":
        raise ConfigError(
            f"{where} asks how far the student is from its teacher, and has none. Use a method "
            "with a teacher, or validate by the reward."
        )
    if Trait.WEIGHS_BY_TRUST in needs and Input.REWARD in needs_of(method.credit):
        raise ConfigError(
            f"{where} has a weight that says how far to trust the teacher, and a reward in its credit that it would "
            "weigh too, though the teacher has no part in that. Leave one of the two out."
        )
    check_signs(method, where)
    check_units(method, where)


def check_signs(method: Method, where: str) -> None:
    """Refuse a method that draws the student towards its teacher and drives it away at once. Raises ConfigError."""
    declared = {name: needs_of(getattr(method, name)) for name in PIECES}
    towards, away = (
        [name for name, needs in declared.items() if side in needs]
        for side in (Trait.MINIMISES_DIVERGENCE, Trait.MAXIMISES_DIVERGENCE)
    )
    if towards and away and Trait.ALLOWS_SIGN_CONFLICT not in method.needs:
        raise ConfigError(
            f"{where} draws the student towards its teacher (its {' and '.join(towards)}) and drives it away from the "
            f"teacher (its {' and '.join(away)}): one undoes the other. Leave one of the two out, or say that "
            "this is meant, with allow_sign_conflict (an option of method anti_sd, and of credit.diverge_from_teacher)."
        )


def check_baseline(method: Method, sampling: Sampling | SamplingSection, where: str) -> None:
    """Refuse what makes a baseline biased: E_y[b grad log p(y)] = 0 for y ~ p alone. Raises ConfigError."""
    looking = [name for name in ("weight", "filter") if Trait.LOOKS_AT_SAMPLED_TOKEN in needs_of(getattr(method, name))]
    reasons = [
        (Trait.OFF_POLICY in method.needs, "its responses are not the student's", "Use an on-policy source"),
        (
            sampling.top_p < 1 or sampling.top_k > 0,
            f"responses are drawn with top_p {sampling.top_p} and top_k {sampling.top_k}, from a part of the student's "
            "distribution",
            "Set sampling.top_p to 1 and sampling.top_k to 0",
        ),
        (bool(looking), f"its {' and '.join(looking)} looks at the sampled token", "Leave it out, or use method opd"),
        (
            Trait.FILTERS in method.needs,
            "its filter chooses responses by what stands in them",
            "Leave it out, or use method opd",
        ),
        (
            Trait.READS_ATTEMPT in method.needs,
            "its teacher reads the response that it scores, and so does the baseline",
            "Use a context without the attempt and the verdict on it, or method opd",
        ),
    ]
    for refused, why, remedy in reasons:
        if refused:
            raise ConfigError(
                f"{where} takes a baseline from the advantage, which leaves the gradient's mean as it is only where "
                f"each token is drawn from the student's own distribution; {why}: the gradient would be biased. "
                f"{remedy}."
            )


def check_units(method: Method, where: str) -> None:
    """Refuse what asks for one vocabulary of a pair with two, and units of a pair with one. Raises ConfigError."""
    two = method.teacher.tokenizer == "any"
    if two != (method.support.kind == "units"):
        raise ConfigError(
            f"{where} has a teacher whose tokenizer is {method.teacher.tokenizer!r} and the support "
            f"{method.support.kind!r}. Units are for a teacher with a tokenizer of its own, and it for units: give "
            "both teacher=external(tokenizer='any') and support=units(), or neither."
        )
    if two and method.top_k:
        raise ConfigError(
            f"{where} compares the most likely tokens of student and teacher, and the teacher has a tokenizer of its "
            "own. Leave out the piece that does, or use a method whose teacher has the student's tokenizer."
        )
    if Input.TEACHER in needs_of(method.update):
        check_comparison(method, where, "validation by teacher_kl", "Validate by the reward")


def check_comparison(method: Method, where: str, setting: str, remedy: str) -> None:
    """Refuse a `setting` that compares both distributions at each token. Raises ConfigError."""
    if method.teacher.tokenizer == "any":
        raise ConfigError(
            f"{where}: {setting} compares student and teacher token by token, and in this method the teacher has a "
            f"tokenizer of its own. {remedy}; the metric units/signal is the divergence on units."
        )


SIDES = frozenset({Trait.MINIMISES_DIVERGENCE, Trait.MAXIMISES_DIVERGENCE})
TEACHERS = frozenset({Reads.TEACHER_LOGP, Reads.TEACHER_ENTROPY})  # needs that only a teacher meets


def incoherence(method: Method) -> str | None:
    """Why the pieces of a method do not fit together, whatever recipe it stands in; None if they do."""
    needs = method.needs
    looking = [name for name in ("weight", "filter") if Trait.LOOKS_AT_SAMPLED_TOKEN in needs_of(getattr(method, name))]
    baseline = Trait.UNBIASED_BASELINE in needs
    obstacles = [
        (
            method.teacher.kind == "none" and bool(method.top_k or needs.batch & TEACHERS or Input.TEACHER in needs),
            "a piece reads what the teacher says, and there is no teacher",
        ),
        (
            Trait.OFF_POLICY in needs and bool(needs.batch & {Reads.SAMPLER_LOGP, Reads.POLICY_LOGP}),
            "a piece reads with which probability the student wrote, and the student does not write",
        ),
        (baseline and Trait.OFF_POLICY in needs, "a baseline is biased for responses that the student did not write"),
        (
            baseline and bool(looking),
            f"the {' and '.join(looking)} looks at the sampled token, which biases a baseline",
        ),
        (
            method.teacher.tokenizer == "any" and (bool(method.top_k) or Input.TEACHER in needs_of(method.update)),
            "a piece compares the models token by token, and the teacher has a tokenizer of its own",
        ),
        (
            {Trait.MINIMISES_DIVERGENCE, Trait.MAXIMISES_DIVERGENCE} <= needs.traits
            and Trait.ALLOWS_SIGN_CONFLICT not in needs,
            "one draws the student towards its teacher, the other drives it away",
        ),
        (
            Trait.WEIGHS_BY_TRUST in needs and Input.REWARD in needs_of(method.credit),
            "the weight says how far to trust the teacher, and would weigh a reward with it",
        ),
        (
            Input.JUDGE in needs and Input.REWARD in needs_of(method.update),
            "the update compares weights by a reward whose yardstick is made anew from the responses it grades",
        ),
    ]
    return next((why for obstructed, why in obstacles if obstructed), None)
