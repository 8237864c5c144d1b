"""Claims of the papers that no study reruns yet, with what a study of them needs."""

from __future__ import annotations

NOT_STUDIED: tuple[tuple[str, str, str], ...] = (
    (
        "Self-distillation aligns a model with a character or a set of emotions faster than reinforcement learning",
        "2605.11182 Fig. 5",
        "a judge of characters",
    ),
    (
        "A fixed constitution is distilled fast, and the teacher caps what the student reaches",
        "2605.11182 Fig. 7",
        "a reward of safe answers; a small form can be made",
    ),
    (
        "On a student's prefix the teacher turns round ('wait', 'but') instead of going on",
        "2605.11182 Fig. 8",
        "models that reason in text",
    ),
    (
        "A larger teacher that also reads the solution teaches less than one that does not",
        "2605.11182 Fig. 10",
        "nothing more; a small form can be made",
    ),
    (
        "The teacher's gain is larger early in a response, and larger on wrong responses than on right ones",
        "2605.11182 Fig. 16-18",
        "the study `length` has the first half",
    ),
    (
        "Persona and strategy as information collapse after 20 to 30 updates",
        "2605.11182 A.13",
        "a judge of conversations",
    ),
    (
        "A student without thinking tags learns broken ones from a teacher that thinks",
        "2605.11182 A.14",
        "two chat templates with and without tags",
    ),
    (
        "With the answer as the only information responses become as short as the answer",
        "2605.11182 A.15",
        "a task whose solution is longer than its answer",
    ),
    (
        "SFT, reinforcement learning and distillation in turn, repeated, keep improving",
        "2605.11182 section 7",
        "several rounds of three stages",
    ),
    (
        "Accuracies of models of 1.5B to 32B on MATH-500, AIME, GPQA, ALFWorld and WebShop",
        "2605.11182, 2604.13016, 2603.25562",
        "GPUs",
    ),
    (
        "A few positive tokens (fillers, short continuations) hold most of the one-token signal at the first update",
        "2603.25562 section 4.3",
        "models that reason in text; `special_tokens` has markers alone",
    ),
    (
        "Student top-k, sampled token and unbiased tails as variants of local support matching",
        "2603.25562 appendix G.3",
        "the two EMA-PG variants as methods",
    ),
    (
        "Distilling where to click from a self that sees a highlighted screen",
        "2605.00642",
        "a study; the recipe `gui_sd` has five seeds",
    ),
    (
        "VISD on video, with a judge's written feedback",
        "2605.06094",
        "a judge that sees the frames; the recipe `visd_frames` has the verified answer as its hint",
    ),
    (
        "Balancing right and wrong responses, and repeating prompts of middling pass rate, helps beside the shift",
        "2605.03677 ablations",
        "the study `order_margin` with `balance` and `upsample`",
    ),
    (
        "Weights by stated confidence teach more than equal ones",
        "2605.01347 ablations",
        "teachers whose confidence is calibrated; `debate` weighs them equally",
    ),
    (
        "A hub of more than two models that teach each other",
        "2604.27083",
        "`topology: hub` and three tasks; `copd` has two models",
    ),
    (
        "The first part of a response counts more: weights that fall along it",
        "2606.22600",
        "`iw_opd` against `opd` at a tuned learning rate",
    ),
)
