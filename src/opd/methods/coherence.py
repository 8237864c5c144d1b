"""The rules for pieces that do not fit together, in one table.

`opd check` refuses a method for which a rule holds, with the rule's remedy. `combine` refuses two methods if
a rule holds for their combination. The table of pairs in docs/methods.md names the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opd.errors import ConfigError
from opd.method import PIECES, Method
from opd.pieces.needs import Input, Need, Needs, Reads, Trait, needs_of
from opd.pieces.normalise import per
from opd.recipe.schema import SamplingSection
from opd.types import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The input of a rule: a method, and the known parts of the recipe. `sampling` None: unknown."""

    method: Method
    sampling: Sampling | SamplingSection | None = None
    asks: bool = False  # the recipe's reward uses judges

    @property
    def needs(self) -> Needs:
        """The needs of all pieces together."""
        return self.method.needs

    @property
    def judged(self) -> bool:
        """Whether rewards come from a judge."""
        return self.asks or Input.JUDGE in self.needs

    @property
    def baseline(self) -> bool:
        """Whether the advantage has a baseline, which must be unbiased."""
        return Trait.UNBIASED_BASELINE in self.needs

    @property
    def truncated(self) -> bool:
        """Whether responses are known to be drawn with top-p or top-k."""
        return self.sampling is not None and (self.sampling.top_p < 1 or self.sampling.top_k > 0)

    @property
    def reads_teacher(self) -> bool:
        """Whether a piece declares that it reads the teacher."""
        numbers = self.needs.batch & {Reads.TEACHER_LOGP, Reads.TEACHER_ENTROPY}
        return bool(numbers) or Input.TEACHER in self.needs or self.needs.top_k > 0

    @property
    def two_tokenizers(self) -> bool:
        """Whether the teacher's tokenizer may differ from the student's."""
        return self.method.teacher.tokenizer == "any"

    @property
    def source_needs(self) -> frozenset[Need]:
        """The inputs and traits of the source."""
        needs = needs_of(self.method.source)
        return needs.inputs | needs.traits

    def update_needs(self, need: Need) -> bool:
        """Whether the update declares `need`."""
        return need in needs_of(self.method.update)

    def pieces(self, need: Need) -> str:
        """The fields of the method that declare `need`, in words; empty if no field does."""
        return " and ".join(name for name in PIECES if need in needs_of(getattr(self.method, name)))

    @property
    def looking(self) -> str:
        """The pieces that depend on the sampled token."""
        return self.pieces(Trait.LOOKS_AT_SAMPLED_TOKEN)

    @property
    def towards(self) -> str:
        """The pieces that move the student towards its teacher."""
        return self.pieces(Trait.MINIMISES_DIVERGENCE)

    @property
    def away(self) -> str:
        """The pieces that move the student away from its teacher."""
        return self.pieces(Trait.MAXIMISES_DIVERGENCE)


@dataclass(frozen=True, slots=True)
class Rule:
    """If `when` holds, `what` is wrong (a clause), and `remedy` helps (sentences). {f...} are fields of Facts."""

    when: Callable[[Facts], bool]
    what: str
    remedy: str


WHY = "A baseline keeps the gradient's mean only if each token is drawn from the student's whole distribution."

RULES: tuple[Rule, ...] = (
    Rule(
        lambda f: f.method.teacher.kind == "none" and f.reads_teacher,
        "a piece reads the teacher's scores, but the method has no teacher",
        "Use a method with a teacher, or leave that piece out; an update can validate by the reward.",
    ),
    Rule(
        lambda f: bool(f.needs.batch & {Reads.SAMPLER_LOGP, Reads.POLICY_LOGP}) and Trait.OFF_POLICY in f.needs,
        "a piece reads the student's log-probs of its responses, but the student does not write them",
        "Use an on-policy source, a signal without importance ratio, or another credit.",
    ),
    Rule(
        lambda f: Trait.SAMPLED_TOKEN_LAST in f.needs and not f.method.support.with_sampled,
        "the signal reads the last token of the support as the sampled token, but the support does not add it",
        "Build the support with top_k(k, with_sampled=True).",
    ),
    Rule(
        lambda f: {Trait.READS_ATTEMPT, Trait.SCORES_UNFINISHED} <= f.needs.traits,
        "the teacher reads the student's attempt, but scores it before it is finished",
        "Use a context without the attempt, or a source in which the teacher does not end responses.",
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
        "the {f.looking} depends on the sampled token, which biases a baseline",
        f"{WHY} Leave it out, or use method opd.",
    ),
    Rule(
        lambda f: f.baseline and Trait.FILTERS in f.needs,
        "the filter selects responses by their content, which biases a baseline",
        f"{WHY} Leave it out, or use method opd.",
    ),
    Rule(
        lambda f: f.baseline and Trait.READS_ATTEMPT in f.needs,
        "the teacher reads the response that it scores, which biases a baseline",
        f"{WHY} Use a context without the attempt and its verdict, or method opd.",
    ),
    Rule(
        lambda f: f.two_tokenizers != (f.method.support.kind == "units"),
        "the teacher's tokenizer is {f.method.teacher.tokenizer!r} and the support {f.method.support.kind!r}",
        "A teacher with another tokenizer needs units, and units need such a teacher: give both "
        "teacher=external(tokenizer='any') and support=units(), or neither.",
    ),
    Rule(
        lambda f: bool(f.method.parts) and f.two_tokenizers,
        "rows that another writes are compared token by token, but the teacher has another tokenizer",
        "Use a teacher with the student's tokenizer, or a method without a second kind of rows.",
    ),
    Rule(
        lambda f: bool(f.method.parts) and Input.GROUP in needs_of(f.method.context),
        "the teacher reads other responses of the group, among which are rows that another wrote",
        "Use a context that reads the prompt alone, or a method without a second kind of rows.",
    ),
    Rule(
        lambda f: f.two_tokenizers and f.needs.top_k > 0,
        "a piece compares the models token by token, but the teacher has another tokenizer",
        "The piece reads the most likely tokens of both. Leave it out, or use a method for one tokenizer.",
    ),
    Rule(
        lambda f: f.two_tokenizers and f.update_needs(Input.TEACHER),
        "a piece compares the models token by token, but the teacher has another tokenizer",
        "The piece is the validation by teacher_kl. Validate by the reward; the metric units/signal is the divergence "
        "on units.",
    ),
    Rule(
        lambda f: f.method.teacher.mixture is not None and {Trait.OFF_POLICY, Input.TEACHER_MODEL} <= f.source_needs,
        "the teacher writes the responses, but a row has several teachers, which write none in common",
        "Use a source in which the student writes, or a method with one teacher of a row.",
    ),
    Rule(
        lambda f: Reads.BASE_LOGP in f.needs and f.update_needs(Input.TEACHER),
        "the update compares weights by the divergence from the teacher, but the signal's target is another "
        "distribution, of teacher and base",
        "Validate by the reward.",
    ),
    Rule(
        lambda f: f.method.teacher.kind == "peer" and f.update_needs(Input.TEACHER),
        "the update compares weights with a teacher, and the teacher is trained in the same step",
        "Its result would depend on which model is updated first. Validate by the reward.",
    ),
    Rule(
        lambda f: bool(f.towards and f.away) and Trait.ALLOWS_SIGN_CONFLICT not in f.needs,
        "a piece moves the student towards its teacher (the {f.towards}) and a piece moves it away (the {f.away})",
        "One undoes the other. Leave one of the two out, or set allow_sign_conflict (an option of method anti_sd and "
        "of credit.diverge_from_teacher).",
    ),
    Rule(
        lambda f: Trait.WEIGHS_BY_TRUST in f.needs and Input.REWARD in needs_of(f.method.credit),
        "the weight measures the trust in the teacher, but it would weigh a reward",
        "The reward does not depend on the teacher. Leave the weight or the reward out.",
    ),
    Rule(
        lambda f: Trait.SHIFTS_RESPONSES in f.needs and f.method.normalise != per("sequence"),
        "the credit adds the same number to every token of a response, and the mean is not per sequence: a response of "
        "500 tokens would be pushed 100 times as far as one of 5",
        "Set average: sequence.",
    ),
    Rule(
        lambda f: f.judged and f.update_needs(Input.REWARD),
        "the update compares weights by a judge's reward, but its rubric is rebuilt from the responses that it grades",
        "Use a reward that checks responses one by one.",
    ),
)


def broken(facts: Facts) -> Rule | None:
    """The first rule that holds, with its fields filled in; None if the pieces fit together."""
    for rule in RULES:
        if rule.when(facts):
            return Rule(rule.when, rule.what.format(f=facts), rule.remedy)
    return None


def check_coherence(facts: Facts, where: str) -> None:
    """Raise ConfigError, beginning with `where`, for pieces that do not fit together."""
    if (rule := broken(facts)) is not None:
        raise ConfigError(f"{where}: {rule.what}. {rule.remedy}")
