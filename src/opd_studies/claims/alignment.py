"""Does a teacher's gradient point to right responses, does `opd probe` measure it, and is it worth training by?

arXiv 2605.10889 compares a teacher's gradient at a node of the tree of responses with the ideal one, which raises the
probability of a right response most. It finds the cosine higher on the student's wrong responses than on its right
ones. It estimates the ideal from forced tokens and trains nothing by it.

Here the reward of sorting allows one mistake, so that the ideal gradient is known exactly
(`opd_studies.worlds.nearly_sorted`), and the probe's estimate can be compared with it on the same nodes. Then students
are trained on the half of each step's tokens that is better aligned, by the exact values of the weights of that step,
against a random half of the same size. The control that could embarrass it: the half of the tokens at which the
response can still become right, which a verifier of prefixes knows without any probe.

Setting A: the trained teacher. B: the teacher stopped early, which is often wrong itself. In the training study B is
the same runs after a third of the updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTERS, SORTING, Lab, Pair, PairSize, optimizer
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, Outcome, differences, finding, over_seeds, ranged

if TYPE_CHECKING:
    from opd.evaluation.response_tree import Node, Visit
    from opd.evaluation.teacher_alignment import Alignment
    from opd_studies.worlds.nearly_sorted import Values

USE = (
    "Trust a cosine of `opd probe` beside its ceiling: it equalled the exact one. Train on all tokens: the better half "
    "by alignment beat a random half at first, not in the end, and the half with the largest KL did as well."
)


REWARD = "opd_studies.worlds.nearly_sorted:nearly"


SAMPLER = "opd_studies.worlds.nearly_sorted:chosen_half"


# Arms: the argument `by` of the sampler; none trains all tokens.
EVERY, BETTER, WORSE, RANDOM, ALIVE, LARGEST = (
    *("all tokens", "better half", "worse half", "random half"),
    *("half that can still be right", "half with the largest KL"),
)


ARMS = {EVERY: None, BETTER: "aligned", WORSE: "misaligned", RANDOM: "random", ALIVE: "alive", LARGEST: "kl"}


FORM = "reverse_kl"


# Names of the numbers of a probe; those of the estimate follow the number of continuations.
EXACT, RIGHT, WRONG, VECTOR, SHARPER = (
    *("teacher, exact mean", "teacher, exact mean on right responses", "teacher, exact mean on wrong responses"),
    *("teacher, exact, as one vector", "the student, sharper, exact mean"),
)


MEAN, SAME, CEILING, TOGETHER, COVERED, NOISE = (
    *("estimated mean", "exact mean of the same visits", "ceiling", "estimate as one vector"),
    *("share of seeds whose interval of it holds the exact one", "noise, estimated mean"),
)


# Thresholds.
EQUAL = 0.05  # cosine: estimate minus exact


NO_ALIGNMENT = 0.1  # cosine of noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each); the sizes of the probe, as of `opd probe`; updates and candidate learning rates."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    prompts: int = 24
    responses: int = 100
    nodes: int = 4
    visits: Sequence[int] = (10, 40)  # the first are among the last
    tau: float = 0.02
    pairs: Mapping[str, PairSize] = field(
        default_factory=lambda: {"A": SORTERS, "B": replace(SORTERS, teacher_steps=100)}
    )
    steps: int = 60
    every: int = 20
    responses_per_step: int = 32
    learning_rates: Sequence[float] = (1e-3, 3e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Lists hold one number per seed. `probed` is by setting and by a name of `numbers_of`, in cosines."""

    visits: Sequence[int]  # numbers of continuations, rising
    probed: Mapping[str, Mapping[str, Sequence[float]]]
    curve: Mapping[str, Sequence[Mapping[int, float]]]  # by arm: held-out accuracy by update
    learning_rate: Mapping[str, float]  # by arm

    def after(self, arm: str, update: int) -> list[float]:
        return [one[update] for one in self.curve[arm]]

    @property
    def updates(self) -> list[int]:
        """The updates before which accuracy was measured, the first 0."""
        return sorted(next(iter(self.curve.values()))[0])


def run(lab: Lab, size: Size | None = None) -> Outcome:
    """Probe all pairs, and train all arms; see the file's docstring."""
    size = size or Size()
    numbers = measure(lab, size)
    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in numbers.learning_rate.items())
    return Outcome(
        setup=(
            f"Sorting five digits, right with at most one wrong character; {len(size.seeds)} pairs of their own seeds. "
            f"Probe: {size.prompts} held-out rows, {size.responses} responses each, {size.nodes} nodes on right and as "
            f"many on wrong ones, tokens above {size.tau:g}, {' and '.join(map(str, size.visits))} continuations of "
            "each, against the exact alignment of the same nodes. A: the trained teacher; B: a teacher stopped after "
            f"{size.pairs['B'].teacher_steps} updates. Training: exact reverse KL, {size.steps} updates of "
            f"{size.responses_per_step} responses, on all tokens or on a half of each step's, by the trained teacher; "
            f"200 held-out rows, one sample each. Learning rate: the best on seed {size.seeds[0]} of "
            f"{', '.join(f'{rate:g}' for rate in size.learning_rates)} (chosen: {rates}). B of the trained halves: "
            f"after {size.every} updates."
        ),
        findings=judge(numbers),
        figure=draw(numbers),
        table=table(numbers),
    )


def measure(lab: Lab, size: Size) -> Numbers:
    """All probes and trainings."""
    probed: dict[str, dict[str, list[float]]] = {}
    for setting, pair_size in size.pairs.items():
        pairs = lab.pairs(size.seeds, pair_size)
        ones = [probe(pair, seed, size) for pair, seed in zip(pairs, size.seeds, strict=True)]
        probed[setting] = {name: [one[name] for one in ones] for name in ones[0]}
        lab.note(f"setting {setting} probed")
    pairs = lab.pairs(size.seeds, size.pairs["A"])
    rates, trained = tuned(lab, size, pairs)
    curve = {
        arm: [{int(row["step"]): row["eval/sampled/reward"] for row in one.evaluations} for one in ones]
        for arm, ones in trained.items()
    }
    return Numbers(visits=sorted(size.visits), probed=probed, curve=curve, learning_rate=rates)


def probe(pair: Pair, seed: int, size: Size) -> dict[str, float]:
    """The numbers of one pair: of the probe, and of the exact alignment of the same nodes."""
    import torch

    from opd.data.prompts import load_prompts
    from opd.evaluation.forced_tokens import rewards_after
    from opd.evaluation.response_tree import Reader, chosen_visits, likely_tokens, tree_of
    from opd.evaluation.teacher_alignment import alignment
    from opd.models.loading import load_model
    from opd.pieces.teacher_rules import external, self_live
    from opd.recipe.schema import DataSection, ModelSpec
    from opd.rewards.registry import load_reward
    from opd.samplers.hf import TransformersSampler
    from opd.teachers.local import local_teacher
    from opd.types import Sampling
    from opd_studies.worlds.nearly_sorted import exact_values

    student = load_model(ModelSpec(path=str(pair.student)), name="student")
    other = load_model(ModelSpec(path=str(pair.teacher)), name="teacher")
    own = local_teacher(self_live(), student, None, micro_batch_tokens=4096)
    teacher = local_teacher(external(), student, other, micro_batch_tokens=4096)
    reward = load_reward(REWARD, {})
    sampling = Sampling(max_completion_length=SORTING.longest)
    prompts = load_prompts(DataSection(**SORTING.rows(size.prompts, part="held_out", seed=seed)))
    write = TransformersSampler(lm=student, sampling=replace(sampling, n=size.responses))
    values = dict(zip((p.id for p in prompts), exact_values(student, prompts), strict=True))
    visits: list[Visit] = []
    for prompt in prompts:
        tree = tree_of(reward(write([prompt], seed=(seed, 1))))
        readers = {"teacher": Reader(teacher=teacher, context=prompt)}
        nodes = likely_tokens(tree, Reader(teacher=own, context=prompt), readers, tau=size.tau, temperature=1.0)
        visits += chosen_visits(tree, nodes, size.nodes, (seed, prompt.id))
    nodes = {visit.node.key: visit.node for visit in visits}
    most = max(size.visits)
    found = rewards_after(student, list(nodes.values()), reward, sampling=sampling, visits=most, seed=seed)
    drawn = dict(zip(nodes, found, strict=True))
    true = {key: torch.stack([exact_at(node, values)] * 2, -1) for key, node in nodes.items()}
    some = {n: {key: rewards[:, :n] for key, rewards in drawn.items()} for n in size.visits}
    seen = {n: [one for one in visits if len(set(some[n][one.node.key].mean(-1).tolist())) > 1] for n in size.visits}
    return numbers_of(
        alignment(visits, true, seed),
        {n: alignment(seen[n], true, seed) for n in size.visits},
        {n: alignment(visits, some[n], seed) for n in size.visits},
    )


def numbers_of(exact: Alignment, same: Mapping[int, Alignment], estimate: Mapping[int, Alignment]) -> dict[str, float]:
    """The numbers of the page. `estimate` by continuations; `same`: exact, of the visits with an estimated gradient."""
    vector = exact.row("teacher", FORM).together
    assert vector is not None, "exact values have no noise"
    found = {
        EXACT: cosine(exact),
        RIGHT: cosine(exact, group="right"),
        WRONG: cosine(exact, group="wrong"),
        VECTOR: vector.mean,
        SHARPER: cosine(exact, "the student, sharper"),
    }
    for n, one in estimate.items():
        together = one.row("teacher", FORM).together
        inside = together is not None and together.low <= vector.mean <= together.high
        found |= {
            f"{n}: {MEAN}": cosine(one),
            f"{n}: {SAME}": cosine(same[n]),
            f"{n}: {CEILING}": one.ceiling["all"],
            f"{n}: {TOGETHER}": float("nan") if together is None else together.mean,
            f"{n}: {COVERED}": float(inside),
            f"{n}: {NOISE}": cosine(one, "noise"),
        }
    return found


def cosine(found: Alignment, name: str = "teacher", group: str = "all") -> float:
    """A mean cosine; NaN where no visit of the group has one."""
    means = found.row(name, FORM if name == "teacher" else "").cosine
    return means[group].mean if group in means else float("nan")


def exact_at(node: Node, values: Mapping[int, Values]) -> Any:
    """The exact Q of a node's tokens, [S]."""
    import torch

    at = values[node.prompt.id].at(node.prefix)
    return torch.zeros(len(node.ids), dtype=torch.float64) if at is None else at[1][node.ids]


def tuned(lab: Lab, size: Size, pairs: Sequence[Pair]) -> tuple[dict[str, float], dict[str, list[Trained]]]:
    """The best learning rate of every arm on the first seed, and the arm's runs with it on all."""
    tried = [(arm, rate) for arm in ARMS for rate in size.learning_rates]
    first = distil_all(lab, [training(size, pairs[0], size.seeds[0], *one) for one in tried])
    ends = {one: run.after["eval/sampled/reward"] for one, run in zip(tried, first, strict=True)}
    best = {arm: max(size.learning_rates, key=lambda rate: ends[arm, rate]) for arm in ARMS}
    jobs = [(arm, seed, pair) for arm in ARMS for seed, pair in zip(size.seeds, pairs, strict=True)]
    runs = distil_all(lab, [training(size, pair, seed, arm, best[arm]) for arm, seed, pair in jobs])
    found: dict[str, list[Trained]] = {arm: [] for arm in ARMS}
    for (arm, _, _), one in zip(jobs, runs, strict=True):
        found[arm].append(one)
    return best, found


def training(size: Size, pair: Pair, seed: int, arm: str, learning_rate: float) -> Distillation:
    """The distillation of one arm."""
    by = ARMS[arm]
    own = {} if by is None else {"sampler": SAMPLER, "sampler_options": {"teacher": str(pair.teacher), "by": by}}
    sampled = {"sampled": {"temperature": 1, "max_completion_length": SORTING.longest}}
    return Distillation(
        pair=pair,
        seed=seed,
        method=FORM,
        task=SORTING,
        stage={
            **own,
            "steps": size.steps,
            "prompts_per_step": size.responses_per_step,
            "optimizer": optimizer(learning_rate, 5),
            "evaluate": held_out(
                SORTING, reward={"name": REWARD}, sampling=sampled, kl=False, before=True, every=size.every
            ),
        },
    )


# --- the numbers of the page -----------------------------------------------------------------------------------------


def judge(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings: each claim, judged by the numbers of both settings."""
    a, b = numbers.probed["A"], numbers.probed["B"]
    few, many = numbers.visits[0], numbers.visits[-1]
    _, early, *_, end = numbers.updates
    return (
        finding(
            "The corrected estimates of the probe equal the exact alignment",
            "2605.10889 (exact baseline, ours)",
            _estimates(a, many),
            _estimates(b, many),
        ),
        finding(
            "With few continuations the mean cosine is smaller than the exact one",
            "2605.10889 (exact baseline, ours)",
            _too_small(a, few),
            _too_small(b, few),
        ),
        finding(
            "A teacher of noise has no alignment",
            "2605.10889 (baseline, ours)",
            _null(a, many),
            _null(b, many),
        ),
        finding(
            "The teacher's gradient is better aligned on wrong than on right responses",
            "2605.10889 abstract",
            _wrong_over_right(a),
            _wrong_over_right(b),
        ),
        finding(
            "Training on the better aligned half of the tokens beats a random half",
            "2605.10889 abstract (it trains nothing; ours)",
            _gain(numbers, RANDOM, end),
            _gain(numbers, RANDOM, early),
        ),
        finding(
            "It beats the half at which the response can still become right",
            "2605.10889 (baseline, ours)",
            _gain(numbers, ALIVE, end),
            _gain(numbers, ALIVE, early),
        ),
    )


def _estimates(of: Mapping[str, Sequence[float]], n: int) -> list[Check]:
    corrected = [a / b for a, b in zip(of[f"{n}: {MEAN}"], of[f"{n}: {CEILING}"], strict=True)]
    gaps = {
        "cosine as one vector": differences(of[f"{n}: {TOGETHER}"], of[VECTOR]),
        "mean cosine over its ceiling": differences(corrected, of[f"{n}: {SAME}"]),
    }
    return [
        Check(what=f"{what}, {n} continuations, estimate minus exact", interval=gap, above=-EQUAL, below=EQUAL)
        for what, gap in gaps.items()
    ]


def _too_small(of: Mapping[str, Sequence[float]], n: int) -> list[Check]:
    gap = differences(of[f"{n}: {MEAN}"], of[f"{n}: {SAME}"])
    return [Check(what=f"mean cosine, {n} continuations, estimate minus exact", interval=gap, below=0.0)]


def _null(of: Mapping[str, Sequence[float]], n: int) -> list[Check]:
    found = over_seeds(of[f"{n}: {NOISE}"])
    return [Check(what="mean cosine of noise", interval=found, above=-NO_ALIGNMENT, below=NO_ALIGNMENT)]


def _wrong_over_right(of: Mapping[str, Sequence[float]]) -> list[Check]:
    gap = differences(of[WRONG], of[RIGHT])
    return [Check(what="exact mean cosine, wrong minus right responses", interval=gap, above=0.0)]


def _gain(numbers: Numbers, other: str, update: int) -> list[Check]:
    gap = differences(numbers.after(BETTER, update), numbers.after(other, update))
    return [Check(what=f"accuracy after {update} updates, {BETTER} minus {other}", interval=gap, above=0.0)]


def table(numbers: Numbers) -> tuple[tuple[str, ...], ...]:
    """Means over seeds with intervals: alignments by setting, then accuracies by arm."""
    _, early, *_, end = numbers.updates
    rows: list[tuple[str, ...]] = [("cosine, or accuracy", "A", "B")]
    rows += [(name, *(_cell(of[name]) for of in numbers.probed.values())) for name in numbers.probed["A"]]
    rows.append(("accuracy before", *[_cell(numbers.after(EVERY, 0))] * 2))
    rows += [
        (f"accuracy, {arm} (A: {end} updates, B: {early})", *(_cell(numbers.after(arm, n)) for n in (end, early)))
        for arm in numbers.curve
    ]
    return tuple(rows)


def _cell(values: Sequence[float]) -> str:
    one = over_seeds(values)
    return ranged(one)


def draw(numbers: Numbers) -> report.Figure:
    """Estimates against exact values, one point a seed; accuracy by update, one line an arm."""
    figure, axes = report.figure(2, width=3.9, height=3.4)
    left, right = axes[0]
    ends: list[float] = []
    for (setting, of), colour in zip(numbers.probed.items(), report.COLOURS, strict=False):
        for n, marker in zip(numbers.visits, "o^", strict=False):
            got = of[f"{n}: {TOGETHER}"]
            left.plot(of[VECTOR], got, marker, color=colour, markersize=4, label=f"{setting}, {n} continuations")
            ends += [*of[VECTOR], *got]
    left.plot([min(ends), max(ends)], [min(ends), max(ends)], "-", color="black", linewidth=0.8)
    left.set(xlabel="exact cosine, all nodes as one vector", ylabel="estimate", title="a point a seed")
    left.legend(fontsize=7)
    for arm, colour in zip(numbers.curve, report.COLOURS, strict=False):
        means = [over_seeds(numbers.after(arm, update)).mean for update in numbers.updates]
        right.plot(numbers.updates, means, "o-", color=colour, markersize=3, label=arm)
    right.set(xlabel="update", ylabel="accuracy, share", title="trained on")
    right.legend(fontsize=7)
    return figure
