"""Which pieces do not fit together: one table of rules.

`opd check` refuses a method of which one holds, with its remedy; `combine` refuses two methods of whose combination one
holds; the table of pairs in docs/methods.md names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opd.errors import ConfigError
from opd.method import PIECES, Method
from opd.pieces.needs import Input, Need, Needs, Reads, Trait, needs_of
from opd.recipe.schema import SamplingSection
from opd.types import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What rules are about: a method, and of the recipe what is known; `sampling` None: nothing."""

    method: Method
    sampling: Sampling | SamplingSection | None = None
    asks: bool = False  # the recipe's reward asks judges

    @property
    def needs(self) -> Needs:
        """Of all pieces together."""
        return self.method.needs

    @property
    def judged(self) -> bool:
        """Whether rewards come from a judge."""
        return self.asks or Input.JUDGE in self.needs

    @property
    def baseline(self) -> bool:
        """Whether the advantage has a baseline, which has to be unbiased."""
        return Trait.UNBIASED_BASELINE in self.needs

    @property
    def truncated(self) -> bool:
        """Whether responses are known to be drawn from a part of the student's distribution."""
        return self.sampling is not None and (self.sampling.top_p < 1 or self.sampling.top_k > 0)

    @property
    def reads_teacher(self) -> bool:
        """Whether a piece says that it reads what a teacher says."""
        numbers = self.needs.batch & {Reads.TEACHER_LOGP, Reads.TEACHER_ENTROPY}
        return bool(numbers) or Input.TEACHER in self.needs or self.needs.top_k > 0

    @property
    def two_tokenizers(self) -> bool:
        """Whether the teacher's tokenizer may be another than the student's."""
        return self.method.teacher.tokenizer == "any"

    def update_needs(self, need: Need) -> bool:
        """Whether the update declares it."""
        return need in needs_of(self.method.update)

    def pieces(self, need: Need) -> str:
        """The fields of the method whose pieces declare it, in words; empty where none does."""
        return " and ".join(name for name in PIECES if need in needs_of(getattr(self.method, name)))

    @property
    def looking(self) -> str:
        """The pieces that look at the sampled token."""
        return self.pieces(Trait.LOOKS_AT_SAMPLED_TOKEN)

    @property
    def towards(self) -> str:
        """The pieces that draw the student towards its teacher."""
        return self.pieces(Trait.MINIMISES_DIVERGENCE)

    @property
    def away(self) -> str:
        """The pieces that drive the student away from its teacher."""
        return self.pieces(Trait.MAXIMISES_DIVERGENCE)


@dataclass(frozen=True, slots=True)
class Rule:
    """`what` is wrong where `when` holds, a clause without an end, and the `remedy`, sentences; {f...} are Facts."""

    when: Callable[[Facts], bool]
    what: str
    remedy: str


WHY = "A baseline leaves the gradient's mean as it is only where each token is drawn from the student's distribution."

RULES: tuple[Rule, ...] = (
    Rule(
        lambda f: f.method.teacher.kind == "none" and f.reads_teacher,
        "a piece reads what the teacher says, and there is no teacher",
        "Use a method with a teacher, or leave that piece out; an update can validate by the reward.",
    ),
    Rule(
        lambda f: bool(f.needs.batch & {Reads.SAMPLER_LOGP, Reads.POLICY_LOGP}) and Trait.OFF_POLICY in f.needs,
        "a piece reads with which probability the student wrote, and the student does not write",
        "Use an on-policy source, a signal without importance ratio, or another credit.",
    ),
    Rule(
        lambda f: Trait.SAMPLED_TOKEN_LAST in f.needs and not f.method.support.with_sampled,
        "the signal takes the last token of the support for the sampled one, and the support does not add it",
        "Build the support with top_k(k, with_sampled=True).",
    ),
    Rule(
        lambda f: {Trait.READS_ATTEMPT, Trait.SCORES_UNFINISHED} <= f.needs.traits,
        "the teacher reads the student's attempt, and scores it while it is being written",
        "Use a context without the attempt, or a source whose responses the teacher does not end.",
    ),
    Rule(
        lambda f: f.baseline and Trait.OFF_POLICY in f.needs,
        "a baseline is biased for responses that the student did not write",
        f"{WHY} Use an on-policy source.",
    ),
    Rule(
        lambda f: f.baseline and f.truncated,
        "responses are drawn with top_p {f.sampling.top_p} and top_k {f.sampling.top_k}, from a part of the student's "
        "distribution, which biases a baseline",
        f"{WHY} Set sampling.top_p to 1 and sampling.top_k to 0.",
    ),
    Rule(
        lambda f: f.baseline and bool(f.looking),
        "the {f.looking} looks at the sampled token, which biases a baseline",
        f"{WHY} Leave it out, or use method opd.",
    ),
    Rule(
        lambda f: f.baseline and Trait.FILTERS in f.needs,
        "the filter chooses responses by what stands in them, which biases a baseline",
        f"{WHY} Leave it out, or use method opd.",
    ),
    Rule(
        lambda f: f.baseline and Trait.READS_ATTEMPT in f.needs,
        "the teacher reads the response that it scores, and so does the baseline, which is biased",
        f"{WHY} Use a context without the attempt and the verdict on it, or method opd.",
    ),
    Rule(
        lambda f: f.two_tokenizers != (f.method.support.kind == "units"),
        "the teacher's tokenizer is {f.method.teacher.tokenizer!r} and the support {f.method.support.kind!r}",
        "Units are for a teacher with a tokenizer of its own, and it for units: give both "
        "teacher=external(tokenizer='any') and support=units(), or neither.",
    ),
    Rule(
        lambda f: f.two_tokenizers and f.needs.top_k > 0,
        "a piece compares the models token by token, and the teacher has a tokenizer of its own",
        "It reads the most likely tokens of both. Leave it out, or use a method whose teacher has the student's "
        "tokenizer.",
    ),
    Rule(
        lambda f: f.two_tokenizers and f.update_needs(Input.TEACHER),
        "a piece compares the models token by token, and the teacher has a tokenizer of its own",
        "It is the validation by teacher_kl. Validate by the reward; the metric units/signal is the divergence on "
        "units.",
    ),
    Rule(
        lambda f: bool(f.towards and f.away) and Trait.ALLOWS_SIGN_CONFLICT not in f.needs,
        "a piece draws the student towards its teacher (its {f.towards}) and one drives it away (its {f.away})",
        "One undoes the other. Leave one of the two out, or say that this is meant, with allow_sign_conflict (an "
        "option of method anti_sd, and of credit.diverge_from_teacher).",
    ),
    Rule(
        lambda f: Trait.WEIGHS_BY_TRUST in f.needs and Input.REWARD in needs_of(f.method.credit),
        "the weight says how far to trust the teacher, and would weigh a reward with it",
        "The teacher has no part in the reward of the credit. Leave one of the two out.",
    ),
    Rule(
        lambda f: f.judged and f.update_needs(Input.REWARD),
        "the update compares weights by a reward whose yardstick is made anew from the responses it grades",
        "Use a reward that checks responses one by one.",
    ),
)


def broken(facts: Facts) -> Rule | None:
    """The first rule that holds, with its fields filled in; None where the pieces fit together."""
    for rule in RULES:
        if rule.when(facts):
            return Rule(rule.when, rule.what.format(f=facts), rule.remedy)
    return None


def check_coherence(facts: Facts, where: str) -> None:
    """Refuse pieces that do not fit together; `where` begins the message. Raises ConfigError."""
    if (rule := broken(facts)) is not None:
        raise ConfigError(f"{where}: {rule.what}. {rule.remedy}")
