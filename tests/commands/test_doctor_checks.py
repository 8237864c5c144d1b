"""The doctor's checks one by one: what each measures, against plain Python, and what each says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from support.doctor import CHAT, all_positions, characters, chatting, check_expected_gradient, pair_of, sums
from support.models import byte_tokenizer, prompts_of, rollout_of, tiny
from support.runs import command, one_stage, prepare, self_taught, two_stages

from opd.commands.doctor import bias, cost, examine, headroom, information, signal, special_tokens, tokenizers
from opd.commands.doctor.findings import Finding, Report, as_json, as_text, skipped, verdict
from opd.commands.doctor.subject import SAMPLES, Subject, stage_to_examine
from opd.errors import ConfigError
from opd.evaluation.compare import compare
from opd.evaluation.continuation import Depth, Transitions
from opd.evaluation.evaluate import HeldOut
from opd.maths.intervals import Interval
from opd.models.endings import turn_end
from opd.models.language_model import LanguageModel
from opd.rewards.registry import load_reward
from opd.runs.prepare import Given
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Sampling
from opd_studies import STUDIES


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel]:
    return characters("student", seed=1), characters("teacher", seed=2, hidden=16)


@pytest.fixture(scope="module")
def pair(models) -> Subject:
    return pair_of(*models, sums(6))


# --- findings --------------------------------------------------------------------------------------------------------

FINE = Finding(name="a/fine", level="ok", says="Fine.")
CHANGE = Finding(name="a/change", level="change", says="Not yet.", remedy="Set options.k to 2.", study="paper 1")
STOP = Finding(name="a/stop", level="stop", says="No.", remedy="Set the stage's teacher.", study="paper 2")


def test_verdict_equals_worst_finding():
    assert verdict([]) == "go"
    assert verdict([FINE, skipped("a/skipped", "no reward")]) == "go"
    assert verdict([FINE, CHANGE]) == "go with these changes"
    assert verdict([CHANGE, STOP, FINE]) == "stop"


def test_findings_name_existing_studies():
    named: set[str] = set()
    for file in Path(examine.__file__).parent.glob("*.py"):
        for names in re.findall(r"`opd study (\w+)`((?: and `\w+`)*)", file.read_text()):
            named |= {names[0], *re.findall(r"`(\w+)`", names[1])}
    assert len(named) > 5
    assert named <= set(STUDIES)


def test_as_text_puts_stop_and_change_first():
    report = Report(
        recipe="mine",
        stage="distil",
        prompts=4,
        seed=1,
        seconds=2.0,
        findings=(FINE, skipped("x", "none"), CHANGE, STOP),
    )
    assert as_text(report) == (
        "mine, stage distil: STOP\n(4 prompts, seed 1, 2 s; 1 stop, 1 change, 1 ok, 1 skipped)\n"
        "\nstop    a/stop: No.\n        do: Set the stage's teacher.\n        see: paper 2"
        "\n\nchange  a/change: Not yet.\n        do: Set options.k to 2.\n        see: paper 1"
        "\n\nok      a/fine: Fine.\n\nskipped x: none"
    )
    read = json.loads(as_json(report))
    assert read["counts"] == {"stop": 1, "change": 1, "ok": 1, "skipped": 1}
    assert read["findings"][2]["remedy"] == "Set options.k to 2."


# --- tokens ----------------------------------------------------------------------------------------------------------


class WithoutEos:
    """A tokenizer whose model ends by its generation config alone."""

    eos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer(*args, **options)


def side(lm: LanguageModel) -> tokenizers.Side:
    return tokenizers.Side.of(lm, lm.name)


def test_same_map_names_tokens_when_ids_differ():
    from opd.models.new import character_tokenizer

    found = tokenizers.same_map(character_tokenizer("abc"), character_tokenizer("acb"), ("small", "large"))
    assert found.level == "stop"
    assert "2 tokens have another id ('b', 'c')" in found.says
    assert "models.large.path" in found.remedy
    assert tokenizers.same_map(character_tokenizer("abc"), character_tokenizer("abc"), ("a", "b")).level == "ok"


def test_templates_finds_first_different_token():
    prompt = Prompt(id=3, content=({"role": "user", "content": "1+1="},))
    student, teacher = chatting("student", seed=0), chatting("teacher", seed=0, template=CHAT.replace("<user>", "Q"))
    assert tokenizers.templates(side(student), side(teacher), [prompt]).level == "ok"
    other = chatting("teacher", seed=0, template=CHAT.replace("<assistant>", "A:"))
    found = tokenizers.templates(side(student), side(other), [prompt])
    assert found.level == "change"
    assert found.numbers == {"prompts": 1, "different": 1, "first_prompt": 3, "first_token": 5}
    assert "'<assistant>' for the student and 'A:' for the teacher" in found.says


@pytest.mark.parametrize(
    ("text", "state"),
    [("<user>2", "outside"), ("<user>2<think>", "inside"), ("2<think></think>\n", "behind"), ("</think>", "behind")],
)
def test_think_state_is_read_from_end_of_prompt(text, state):
    assert tokenizers.think_state(text) == state


def test_thinking_asks_change_when_think_states_differ():
    thinks = CHAT.replace("<assistant>{% endif %}", "<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}")
    student = chatting("student", seed=0, template=thinks)
    teacher = replace(chatting("teacher", seed=0, template=thinks), template_options={"enable_thinking": True})
    prompt = Prompt(id=0, content=({"role": "user", "content": "1"},))
    found = tokenizers.thinking(side(student), side(teacher), [prompt])
    assert found.level == "change"
    assert found.numbers == {"student": "outside", "teacher": "inside"}
    assert "models.teacher.template_options to the same enable_thinking" in found.remedy
    assert tokenizers.thinking(side(teacher), side(teacher), [prompt]).level == "ok"
    assert tokenizers.thinking(side(student), side(student), prompts_of("1")).level == "skipped"


def test_endings_names_teacher_end_when_student_has_no_eos_token():
    student, teacher = chatting("student", seed=0), chatting("teacher", seed=0, end="<end>")
    ours = replace(side(student), tokenizer=WithoutEos(student.tokenizer))
    found = tokenizers.endings(ours, side(teacher), chat=False)
    assert found.level == "change"
    says = "The teacher ends its turn with '<end>', and the student's response continues after it."
    assert found.says == says
    assert tokenizers.endings(ours, side(teacher), chat=True).says == (
        f"{says} The student ends its response with '<eos>', which does not end the teacher's."
    )


def test_endings_asks_change_when_end_of_turn_differs():
    student, teacher = chatting("student", seed=0), chatting("teacher", seed=0, end="<end>")
    assert turn_end(student.tokenizer) == student.tokenizer.eos_token_id
    assert tokenizers.endings(side(student), side(student), chat=True).level == "ok"
    end = student.tokenizer.eos_token_id
    paired = tokenizers.paired_endings(side(student), side(teacher), {end: teacher.tokenizer.eos_token_id})
    assert paired.level == "ok"
    assert paired.says == "The teacher reads the end of the student's responses as its own: '<eos>' as '<end>'."
    assert tokenizers.paired_endings(side(student), side(teacher), {}).level == "change"
    found = tokenizers.endings(side(student), side(teacher), chat=True)
    assert found.level == "change"
    assert found.says == (
        "The teacher ends its turn with '<end>', and the student's response continues after it. The student ends its "
        "response with '<eos>', which does not end the teacher's."
    )
    assert "sampling.stop to ['<end>']" in found.remedy
    bare = chatting("teacher", seed=0, template=CHAT.replace("END", ""))
    assert tokenizers.endings(side(student), side(bare), chat=True).level == "skipped"
    assert tokenizers.endings(side(student), side(bare), chat=False).level == "ok"


def test_splits_names_markers_when_tokenizers_split_otherwise():
    student, teacher = byte_tokenizer(), byte_tokenizer()
    ours = tokenizers.Side(name="student", tokenizer=student, options={}, stops=frozenset({1}))
    theirs = replace(ours, name="teacher", tokenizer=teacher)
    assert tokenizers.splits(ours, theirs, ["<think>"]).level == "ok"
    teacher.add_tokens(["<think>"])
    found = tokenizers.splits(ours, theirs, ["one", "<think>two"])
    assert found.level == "change"
    assert found.numbers["markers_cut_otherwise"] == ["<think>"]
    assert found.numbers["responses_cut_otherwise"] == 1
    assert (
        "'<think>' is ['<', 't', 'h', 'i', 'n', 'k', '>'] for the student and ['<think>'] for the teacher" in found.says
    )
    assert "options.mask_tokens: ['<think>']" in found.remedy


# --- signal ----------------------------------------------------------------------------------------------------------


def test_self_test_is_ok_when_scores_match(pair):
    found = signal.self_test(pair)
    assert found.level == "ok"
    assert found.numbers["log_ratio_max"] < 1e-4
    assert found.numbers["sampler_difference_max"] < 1e-4
    assert found.numbers["tokens"] == sum(len(r.response_ids) for r in pair.firsts[: signal.FEW])


def test_self_test_stops_when_scores_are_shifted(pair):
    moved = [replace(r, policy_logp=torch.roll(r.policy_logp, 1)) for r in pair.rollouts]
    found = signal.self_test(replace(pair, rollouts=moved))
    assert found.level == "stop"
    assert "scores are not those of the sampled tokens" in found.says


def test_repeatability_stops_when_scores_vary_or_are_nan(pair, monkeypatch):
    assert signal.repeatability(pair).level == "ok"
    score = LocalTeacher.score
    calls = []

    def noisy(self, *arguments, **options):
        calls.append(1)
        return [replace(s, teacher_logp=s.teacher_logp - len(calls)) for s in score(self, *arguments, **options)]

    monkeypatch.setattr(LocalTeacher, "score", noisy)
    found = signal.repeatability(pair)
    assert found.level == "stop"
    assert found.numbers["again_max"] == pytest.approx(1.0)
    assert found.numbers["other_batches_max"] == pytest.approx(2.0)

    def broken(self, *arguments, **options):
        return [replace(s, teacher_logp=s.teacher_logp * torch.nan) for s in score(self, *arguments, **options)]

    monkeypatch.setattr(LocalTeacher, "score", broken)
    found = signal.repeatability(pair)
    assert found.level == "stop"
    assert "log-probs are not finite" in found.says


def test_strength_stops_when_teacher_equals_student(models):
    student, _ = models
    twin = pair_of(student, student, sums(4))
    found = signal.strength(twin, signal.compared(twin))
    assert found.level == "stop"
    assert "predicts what the student predicts already" in found.says
    assert bias.truncation(twin).level == "skipped"


def test_overlap_asks_change_when_ratio_is_low(pair):
    student, teacher = (tiny("llama", byte_tokenizer(), name=n, seed=i) for i, n in enumerate(("student", "teacher")))
    strangers = pair_of(student, teacher, sums(4))
    found = signal.overlap(strangers, signal.compared(strangers))
    assert found.level == "change"
    assert found.numbers["overlap_ratio"] < 0.7
    assert found.numbers["teacher_mass_on_overlap"] < 0.97
    assert "method: sft with options.source: teacher" in found.remedy
    same = pair_of(student, student, sums(4))
    assert signal.overlap(same, signal.compared(same)).numbers["overlap_ratio"] == 1.0
    assert signal.overlap(pair, signal.compared(pair)).level == "skipped"  # every top 16 of 16 tokens overlaps


def test_by_position_finds_step_where_signal_fades(pair):
    comparison = signal.compared(pair)
    step = torch.arange(64)
    columns = {name: torch.ones(64) for name in ("reverse_kl",)}
    flat = replace(comparison, step=step, **columns)
    assert signal.by_position(flat).says.endswith("not faded at the end.")
    faded = replace(flat, reverse_kl=torch.where(step < 32, 1.0, 0.01))
    found = signal.by_position(faded)
    assert found.numbers["faded_from"] == 32
    assert [row["from"] for row in found.numbers["buckets"]] == [0, 16, 32, 48]
    assert found.level == "ok"


def test_kinds_of_separates_ends_from_special_tokens():
    lm = characters("student", seed=0)
    prompt = sums(1)[0]
    finished = rollout_of(lm, prompt, [5, 1, 6, 1])
    cut = replace(rollout_of(lm, prompt, [1, 7], trained=[True, False]), finished=False)
    ends, others = special_tokens.kinds_of([finished, cut], frozenset({0, 1}))
    assert ends.tolist() == [False, False, False, True, False]
    assert others.tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(("alike", "level"), [(0.0, "stop"), (None, "change"), (0.5, "ok")])
def test_special_tokens_level_follows_ends_alike(pair, monkeypatch, alike, level):
    comparison = signal.compared(pair)
    ends, _ = special_tokens.kinds_of(pair.firsts, frozenset())
    assert bool(ends.any()), "the fixture needs a finished response"
    sure = replace(comparison, student_logp=torch.zeros(len(ends)))
    broken = replace(sure, teacher_logp=torch.where(ends, -58.0, -0.5))
    monkeypatch.setattr(special_tokens, "ends_alike", lambda pair: alike)
    found = special_tokens.special_tokens(pair, broken)
    assert found.level == level
    assert found.numbers["end"] == pytest.approx(-58.0)
    fine = replace(sure, teacher_logp=torch.full((len(ends),), -0.5))
    assert special_tokens.special_tokens(pair, fine).level == "ok"
    unsure = replace(broken, student_logp=torch.full((len(ends),), -3.0))
    assert "end" not in special_tokens.special_tokens(pair, unsure).numbers


def test_ends_alike_reads_teacher_responses(pair):
    assert special_tokens.ends_alike(pair) in (None, 1.0)  # both stop at <eos>
    other = replace(pair, student=replace(pair.student, stop_ids=frozenset({0})))
    assert special_tokens.ends_alike(other) in (None, 0.0)
    talks = pair_of(chain(pair), chain(pair), sums(2))
    assert special_tokens.ends_alike(talks) == 1.0


def chain(pair: Subject) -> LanguageModel:
    """A model that says one more character after = and ends."""
    from support.models import chain as chained

    return chained("=5", pair.student.tokenizer)


# --- bias ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "gradient"),
    [
        ("stop_gradient", oracle.grad_topk_stop_gradient),
        ("renormalised", oracle.grad_renormalised),
        ("tail", oracle.grad_tail),
    ],
)
def test_support_gradient_equals_oracle(models, form, gradient):
    chosen = pair_of(*models, sums(2), options={"k": 3, "by": "teacher", "form": form})
    for at in all_positions(chosen):
        ours = bias.support_gradient(chosen.method.signal, at)
        exact = bias.exact_gradient(oracle_free_reverse_kl, at)
        for i, row in enumerate(at.rows.tolist()):
            z, q = at.student[i].tolist(), at.teacher[i].tolist()
            support = at.micro.support_ids[row].tolist()
            assert ours[i].tolist() == pytest.approx(gradient(z, q, support), abs=1e-9)
            assert exact[i].tolist() == pytest.approx(oracle.grad_full(z, q), abs=1e-9)


def oracle_free_reverse_kl(student_logp, teacher_logp):
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def test_truncation_is_unbiased_when_token_is_sampled(models):
    chosen = pair_of(*models, sums(4), method="opd", options={})
    check_expected_gradient(chosen)
    found = bias.truncation(chosen)
    assert found.level == "ok"
    assert found.numbers["cosine"] == pytest.approx(1.0)
    assert found.numbers["length"] == pytest.approx(1.0)


def test_expected_gradient_is_zero_when_log_ratio_is_loss(models):
    """2605.11182 Fig. 12: log p - log q as a loss."""
    at = all_positions(pair_of(*models, sums(2), method="opd", options={}))[0]
    ours = bias.expected_gradient(lambda t: t.student_logp - t.teacher_logp, at)
    assert ours.abs().max() < 1e-12


def test_truncation_asks_change_when_form_is_raw(models):
    with pytest.warns(UserWarning, match="biased"):
        chosen = pair_of(*models, sums(6), options={"k": 1, "form": "raw"})
    found = bias.truncation(chosen)
    assert found.level == "change", found
    assert "options.form: tail" in found.remedy
    assert "2605.11182" in found.study
    exact = bias.truncation(pair_of(*models, sums(2), method="reverse_kl", options={}))
    assert (exact.level, exact.numbers) == ("ok", {})


# --- headroom --------------------------------------------------------------------------------------------------------


def depth(at: int, gain: float) -> Depth:
    half = Interval(0.5, 0.3, 0.7)
    return Depth(
        depth=at,
        responses=8,
        too_short=0,
        prefix_length=float(at),
        continuing=Interval(0.5 + gain, 0.0, 1.0),
        alone=half,
        student=half,
        transitions=Transitions(right_right=2, right_wrong=2, wrong_right=2, wrong_wrong=2),
        finished_share=1.0,
    )


@pytest.mark.parametrize(
    ("gains", "wanted", "limit"),
    [
        ([0.4, 0.3, 0.2], 10, None),  # not faded at the end
        ([0.4, 0.3, 0.01], 10, 300),  # gone behind 300
        ([0.4, 0.0, 0.01], 10, 200),
        ([0.4, 0.0, 0.2], 10, None),  # it comes back
        ([0.4, 0.0, 0.01], 250, 250),  # the teacher itself needs more
        ([0.0, 0.0, 0.0], 10, 100),
    ],
)
def test_response_limit_follows_continuation_gains(gains, wanted, limit):
    depths = [depth(100 * (i + 1), gain) for i, gain in enumerate(gains)]
    assert headroom.response_limit(0.4, depths, wanted) == limit
    assert headroom.response_limit(0.0, depths, wanted) is None


def test_judged_gives_reason_when_reward_is_missing(models):
    bare = [replace(p, answer=None) for p in sums(4)]
    silent = pair_of(*models, bare, reward=None)
    why = headroom.judged(silent)
    assert why == "The stage has no reward, and neither has its evaluation: accuracy cannot be measured."
    for found in (headroom.headroom(silent, why), headroom.probe(silent, why), information.transfer(silent, why)):
        assert (found.level, found.says) == ("skipped", why)


def test_judged_uses_held_out_reward_when_stage_has_none(models):
    bare = [replace(p, answer=None) for p in sums(4)]
    held_out = HeldOut(
        prompts=sums(8), sampling={"sampled": Sampling()}, reward=load_reward("final_number", {}), seed=0
    )
    silent = pair_of(*models, bare, reward=None)
    judgement = headroom.judged(replace(silent, held_out=held_out))
    assert isinstance(judgement, headroom.Judged)
    assert all(rollout.prompt.answer is not None for rollout in judgement.student)  # held-out prompts
    assert len(judgement.student) == len(judgement.teacher) == 4 * SAMPLES
    found = information.transfer(replace(privileged_pair(models[0]), held_out=held_out, reward=None), judgement)
    assert found.says == "Rewards were measured on held-out prompts, and this check needs the stage's prompts."
    answered = replace(pair_of(*models, sums(4), reward=None), held_out=held_out)
    own = headroom.judged(answered)
    assert isinstance(own, headroom.Judged)
    assert [r.prompt for r in own.student] == [r.prompt for r in answered.rollouts]  # they have what held-out ones have
    reads_more = replace(privileged_pair(models[0]), held_out=held_out, reward=None)
    assert (
        headroom.judged(reads_more) == "The teacher reads privileged_context, which the held-out prompts do not have."
    )


def privileged_pair(student: LanguageModel) -> Subject:
    """A student that is its own teacher, with a fact about each prompt and no answer."""
    rows = [Prompt(id=i, content=f"{i}+1=", privileged_context=c) for i, c in enumerate("7890")]
    options = {"template": "{privileged_context}{prompt}", "k": None}
    return pair_of(student, None, rows, method="context_distillation", options=options, reward=None)


def test_headroom_asks_more_prompts_when_sample_is_small(pair):
    judgement = headroom.judged(pair)
    assert isinstance(judgement, headroom.Judged)
    n = len(judgement.student)
    few = replace(
        judgement,
        student=[replace(r, reward=0.0) for r in judgement.student],
        teacher=[replace(r, reward=float(i == 0)) for i, r in enumerate(judgement.teacher)],
    )
    found = headroom.headroom(pair, few)
    assert found.level == "change"
    assert found.numbers["gap"] == pytest.approx(1 / n)
    assert found.numbers["only_teacher"] == 1
    assert "--prompts" in found.remedy
    assert found.numbers["teacher_low"] == pytest.approx(0.0, abs=0.1)
    graded = replace(few, teacher=[replace(r, reward=0.5) for r in few.teacher])
    assert "pass@" not in headroom.headroom(pair, graded).says
    assert headroom.probe(pair, graded).level == "skipped"


def test_share_behind_gives_share_of_tokens_beyond_limit():
    lm = characters("student", seed=0)
    rows = [rollout_of(lm, sums(1)[0], [5] * n) for n in (2, 6, 8)]
    assert headroom.share_after(rows, 6) == pytest.approx(2 / 16)
    assert headroom.share_after(rows, 8) == 0.0


@pytest.mark.parametrize(("share", "wanted"), [(0.9, 9), (0.5, 5), (1.0, 10), (0.01, 1)])
def test_quantile_gives_observed_length(share, wanted):
    assert headroom.quantile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], share) == wanted


# --- information -----------------------------------------------------------------------------------------------------


def test_with_columns_of_rotates_privileged_context(models):
    prompts = [Prompt(id=i, content=f"{i}+1=", privileged_context=c, answer=c) for i, c in enumerate("789")]
    rows = [rollout_of(models[0], prompt, [5, 1]) for prompt in prompts]
    moved = information.with_columns_of(rows, 2)
    assert [r.prompt.privileged_context for r in moved] == ["9", "7", "8"]
    assert [r.prompt.content for r in moved] == ["0+1=", "1+1=", "2+1="]


def test_disagreement_is_bounded_by_the_loss(models):
    """-log Z is the least loss over all students, so that this student's is at least as large (2605.11182 eq. 11)."""
    chosen = privileged_pair(models[0])
    found = information.disagreement(chosen)
    assert 0 < found.numbers["minus_log_z"] <= found.numbers["loss"]
    assert found.numbers["contexts"] == 4
    assert found.numbers["share"] == pytest.approx(found.numbers["minus_log_z"] / found.numbers["loss"])
    plain = pair_of(*models, sums(3))
    assert information.disagreement(plain).level == "skipped"
    alone = replace(chosen, rollouts=chosen.rollouts[:1])
    assert (
        information.disagreement(alone).says
        == "Privileged information is compared between prompts, and there is only one prompt."
    )


# --- cost ------------------------------------------------------------------------------------------------------------


def test_cost_scales_one_step_to_recipe(pair, monkeypatch):
    parts = cost.Step(prompts=4, tokens=40, generate=1.0, score=2.0, train=3.0, grad_norm=0.1)
    monkeypatch.setattr(cost, "one_step", lambda pair: parts)
    found = cost.cost(pair)  # 8 prompts a step, 5 steps
    assert found.numbers["step_s"] == pytest.approx(12.0)
    assert found.numbers["stage_s"] == pytest.approx(60.0)
    assert "A step of 8 prompts takes about 12.0 s" in found.says
    monkeypatch.setattr(cost, "total_bytes", lambda device: 1000)
    found = cost.cost(pair)
    assert found.level == "change"
    assert "micro_batch_tokens (now 4096)" in found.remedy


# --- stages and the command line -------------------------------------------------------------------------------------


def test_stage_to_examine_selects_first_stage_with_teacher(tmp_path):
    from opd.recipe.load import parse_recipe

    recipe = parse_recipe(two_stages())
    assert stage_to_examine(recipe, None, Given()).name == "distil"
    with pytest.raises(ConfigError, match=r"stage 'teach' does not have a teacher that scores\. Choose a stage"):
        stage_to_examine(recipe, "teach", Given())
    with pytest.raises(ConfigError, match=r"There is no stage 'distill' in tiny\. Its stages: teach, distil\."):
        stage_to_examine(recipe, "distill", Given())


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_doctor_prints_json_and_writes_no_run(work):
    prepare(work, one_stage(evaluate={"data": {"path": "held_out.jsonl"}, "reward": {"name": "final_number"}}))
    ended = command("doctor", "recipe.yaml", "--json", "--prompts", "4")
    read = json.loads(ended.out)
    assert ended.code == (3 if read["verdict"] == "stop" else 0)
    assert read["stage"] == "distil"
    assert read["prompts"] == 4
    assert {row["name"].split("/")[0] for row in read["findings"]} == {
        "reward", "tokens", "signal", "headroom", "information", "cost",
    }  # fmt: skip
    assert "doctor: tokenizers" in ended.err
    assert not Path("run").exists()
    assert not Path("runs").exists()


def test_doctor_examines_ema_teacher(work):
    prepare(work, self_taught())
    read = json.loads(command("doctor", "recipe.yaml", "--json", "--prompts", "3").out)
    levels = {row["name"]: row["level"] for row in read["findings"]}
    assert levels["tokens/same"] == "ok"
    assert levels["headroom/accuracy"] == "skipped"
    assert levels["information/disagreement"] in ("ok", "change")


def test_doctor_stops_before_weights_load_when_tokens_differ(work, monkeypatch):
    from support.runs import forbid, tiny_model

    recipe = one_stage()
    recipe["models"]["teacher"] = tiny_model(1, characters="0123456789+=")
    prepare(work, recipe)
    forbid(monkeypatch, "opd.runs.build.load_model")
    ended = command("doctor", "recipe.yaml")
    assert ended.code == 3
    assert ended.out.startswith("tiny, stage distil: STOP")
    assert "1 tokens exist only in the student (';')" in " ".join(ended.out.split())


def test_doctor_names_model_when_its_stage_has_not_run(work):
    prepare(work, two_stages())
    ended = command("doctor", "recipe.yaml")
    assert ended.code == 2
    assert "begins with model 'teacher' from stage 'teach'" in ended.err
    assert "Run `opd train` until that stage is done" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "examines a sample of at least 1 prompt; got --prompts 0."),
        (["--stage", "x"], "There is no stage 'x' in tiny. Its stages: distil."),
        (["steps=0"], "`stages.0.steps`"),
    ],
)
def test_doctor_refuses_bad_options(work, arguments, message):
    prepare(work, one_stage())
    ended = command("doctor", "recipe.yaml", *arguments)
    assert ended.code == 2
    assert message in ended.err


def test_strength_equals_compare(pair):
    found = signal.strength(pair, signal.compared(pair))
    again = compare(pair.student, pair.teacher, pair.firsts, pair.contexts(pair.firsts), k=4)
    assert found.numbers["reverse_kl"] == pytest.approx(again.reverse_kl.double().mean().item())
    assert math.isclose(
        found.numbers["negative_share"], float((again.teacher_logp < again.student_logp).double().mean())
    )
