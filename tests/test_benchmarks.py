"""`benchmarks/`: every module imports, and opd's side of each runs end to end at a toy size, as do peers that are here.

TRL and Liger are in the benchmarks' environment only; what needs them is skipped elsewhere, with that reason. The
models and the tokenizer are made here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.recipe.load import load_recipe

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))
PEER_PACKAGES = ("trl", "liger_kernel")
VOCABULARY = 64  # more than the tokenizer has: some sampled ids have no token
FAKE_VLLM = """
class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.max_tokens = max_tokens

class Output:
    def __init__(self, token_ids):
        self.token_ids = token_ids

class Request:
    def __init__(self, prompt, length):
        self.prompt_token_ids, self.outputs = prompt, [Output([0] * length)]

class LLM:
    def __init__(self, **_):
        print("vLLM prints to stdout")

    def generate(self, prompts, sampling, use_tqdm):
        return [Request(prompt["prompt_token_ids"], sampling.max_tokens) for prompt in prompts]
"""


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a benchmark by name; all of them are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def toy(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """`load` with small models, a tokenizer of one token per word, and `served` in place of the workers' loop."""
    workload = load("workload")
    words = {word: i for i, word in enumerate(["<unk>", "<end>", *workload.WORDS.split()])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    tok.save_pretrained(tmp_path / "tokenizer")
    small = workload.Size(hidden=8, layers=1, heads=2, intermediate=8, vocabulary=VOCABULARY)
    monkeypatch.setattr(workload, "SIZES", dict.fromkeys(workload.SIZES, small))
    monkeypatch.setattr(workload, "tokenizer", lambda: tok)
    monkeypatch.setattr(workload, "tokenizer_folder", lambda: tmp_path / "tokenizer")
    return load


@pytest.fixture
def served(toy: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """The list to which the workers of a module append their work, instead of serving it."""

    def collect(module: str) -> list[Any]:
        works: list[Any] = []
        monkeypatch.setattr(toy(module), "serve", works.append)
        return works

    return collect


def small_step(toy: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    step = toy("step")
    for name, value in {"PROMPTS": 2, "PROMPT_TOKENS": 4, "NEW_TOKENS": 3}.items():
        monkeypatch.setattr(step, name, value)
    return step


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_imports(load: Callable[[str], ModuleType], name: str):
    try:
        load(name)
    except ModuleNotFoundError as error:
        if error.name in PEER_PACKAGES:
            pytest.skip(f"{error.name} is not installed")
        raise


@pytest.mark.parametrize(
    ("contestant", "part"),
    [
        ("opd", "loss_value"),
        ("bare", "backward"),
        pytest.param("check", "losses", marks=needs("trl")),
    ],
)
def test_step_contestant_runs(toy, served, monkeypatch: pytest.MonkeyPatch, contestant: str, part: str):
    step, works = small_step(toy, monkeypatch), served("step")
    getattr(step, f"{contestant}_worker")()
    answers = [works[0]({}) for _ in range(2)]
    assert part in answers[0]
    if contestant == "check":
        assert set(answers[0]["relative_difference"]) == set(step.TRAINERS)
        return
    row = step.summary(answers)
    assert row["total"]["median"] == answers[1]["total"]
    assert row["total_cpu"]["median"] == answers[1]["total_cpu"] > 0


CONTESTANTS_OF_LOSS = [
    *("full", "full_generic", "naive"),
    *("skew", "top32_tail", "top32_stop_gradient", "top32_renormalised", "sampled"),
    *(pytest.param(name, marks=needs("trl")) for name in ("trl", "trl_tuned", "trl_sampled", "trl_sampled_tuned")),
    pytest.param("liger", marks=needs("liger_kernel")),
]


@pytest.mark.parametrize("name", CONTESTANTS_OF_LOSS)
def test_loss_contestant_agrees_with_its_group(load: Callable[[str], Any], name: str):
    loss = load("loss")
    row = {"name": name, **loss.loss_and_gradient(loss.side(name), 96, 6, 8)}
    assert row["total"] > 0
    assert row["total_cpu"] > 0
    for names, reference in zip(loss.SAME_FUNCTION, ("naive", "sampled"), strict=True):
        if name in names:
            loss.check_agreement([{"name": reference, **loss.loss_and_gradient(loss.side(reference), 96, 6, 8)}, row])


def test_loss_grid_has_every_contestant(load: Callable[[str], Any]):
    loss = load("loss")
    for which in ("quick", "default", "full"):
        raced = {name for point in loss.grid(which) for name in point["names"]}
        assert {name for names in loss.SAME_FUNCTION for name in names} | set(loss.FORMS) <= raced
    assert {point["threads"] for point in loss.grid("default")} == {1, loss.THREADS}


def test_loss_ratio_is_of_same_function_only(load: Callable[[str], Any]):
    rows = {
        name: {"total": {"median": seconds}, "peak_bytes": 0}
        for name, seconds in {"full": 1.0, "sampled": 1.0, "skew": 1.0, "trl": 4.0, "trl_sampled": 2.0}.items()
    }
    ratio = load("tables").loss_ratio
    assert [ratio(rows, name, "", "total") for name in ("full", "sampled", "skew")] == ["0.25", "0.50", "-"]
    assert ratio(rows, "full", "_tuned", "total") == "-"


@pytest.mark.parametrize("name", ["opd", "generate", "generate_static"])
def test_generate_contestant_reads_the_prompts(toy, served, monkeypatch: pytest.MonkeyPatch, name: str):
    generate, works = toy("generate"), served("generate")
    monkeypatch.setattr(generate, "PROMPT_TOKENS", 4)
    generate.worker(name)
    answer = works[0](generate.request(generate.point("5M", 2, 0.95, 5), generate.tokenizer()))
    assert answer["seconds"] > 0
    row = generate.row_of(name, generate.point("5M", 2, 0.95, 5), [{"seconds": 0.5, "seconds_cpu": 0.25}])
    assert row["tokens_per_second"]["median"] == 20.0
    assert row["cpu"]["median"] == 0.25


def test_vllm_worker_takes_turns_on_the_same_prompts(toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    generate = toy("generate")
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(generate, "PROMPT_TOKENS", 4)
    with generate.vllm_engine(sys.executable, ("5M", True), tmp_path) as engine:
        rows = generate.run_point({}, engine, generate.point("5M", 2, 1.0, 5))
    assert [row["name"] for row in rows] == ["vllm"]
    assert rows[0]["cpu"]["low"] >= 0


def test_vllm_engine_that_fails_is_skipped(toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    (tmp_path / "vllm.py").write_text("raise ImportError('no vLLM here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with toy("generate").vllm_engine(sys.executable, ("5M", True), tmp_path) as engine:
        assert engine == {}
    assert "vllm skipped at 5M: ImportError: no vLLM here" in capsys.readouterr().out


class InProcess:
    """A worker that answers in this process."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def ask(self, request: Any) -> Any:
        return self.work(json.loads(json.dumps(request)))


def test_decode_contestants_give_the_same_logits(toy, monkeypatch: pytest.MonkeyPatch):
    decode, workload = toy("decode"), toy("workload")
    for name, value in {"ROWS": 2, "PROMPT_TOKENS": 4, "NEW_TOKENS": 3, "ROUNDS": 1}.items():
        monkeypatch.setattr(decode, name, value)
    rows = decode.race(workload.language_model(workload.causal_lm("5M"), workload.tokenizer()))
    assert set(rows) >= {"opd", "static"}
    for row in rows.values():
        assert row["difference"] < 1e-5
        assert row["milliseconds"]["low"] > 0


def test_gpu_script_names_files_and_options_that_exist():
    """It runs by hand, on a GPU or with `--quick`: a path that moved would be seen too late."""
    script = (FOLDER / "gpu.sh").read_text()
    for path in re.findall(r"(?:benchmarks|tests|recipes)/[\w/]+\.(?:py|yaml)", script):
        assert (FOLDER.parent / path).exists(), path
    limits = [int(limit) for limit in re.findall(r"^ *part \w+ (\d+) ", script, re.MULTILINE)]
    assert len(limits) == 6
    assert sum(limits) <= 10 * 60
    overrides = dict(re.findall(r" ([\w.]+)=([\w]+)", script.split("recipes/quickstart.yaml")[1].splitlines()[0]))
    recipe = load_recipe(FOLDER.parent / "recipes/quickstart.yaml", [f"{k}={v}" for k, v in overrides.items()])
    assert recipe.stages[0].steps == 4
    assert recipe.stages[0].evaluate is None


def test_scaling_axes_run(toy, served, monkeypatch: pytest.MonkeyPatch):
    scaling, works = toy("scaling"), served("scaling")
    small = {"prompt_tokens": 4, "new_tokens": 3, "vocabulary": VOCABULARY}
    monkeypatch.setattr(scaling, "BASE", {**scaling.BASE, **small})
    monkeypatch.setattr(scaling, "ROUNDS", {})
    monkeypatch.setattr(scaling, "OTHER_ROUNDS", 2)
    scaling.worker()
    for axis, points in scaling.AXES.items():
        few = [{**point, "k": min(point.get("k", 0), 8), **small} for point in (points[0], points[-1])]
        rows = scaling.run_axis(InProcess(works[0]), axis, few)
        assert [row[scaling.VARIED[axis]] is not None for row in rows] == [True, True]
        assert ("of_linear" in rows[0]) == (axis in scaling.WORK)


@pytest.mark.parametrize("vocabulary", [8, VOCABULARY])
def test_scaling_side_has_fewer_or_more_tokens_than_the_tokenizer(toy, vocabulary: int):
    scaling = toy("scaling")
    tok = scaling.tokenizer()
    assert 8 < len(tok) < VOCABULARY
    point = {**scaling.BASE, "prompts": 2, "prompt_tokens": 4, "new_tokens": 3, "vocabulary": vocabulary}
    side = scaling.make_side(point, tok)
    assert side.student.head().vocabulary == side.teacher.head().vocabulary == vocabulary
    rollouts = side.sampler(scaling.prompts(2, 4, tok), seed=(0, 0))
    assert max(int(rollout.response_ids.max()) for rollout in rollouts) < vocabulary


def test_of_linear_is_cost_per_work_over_least_before(load: Callable[[str], Any]):
    scaling = load("scaling")
    rows = [
        {"x": x, "seconds": {part: {"median": seconds} for part in scaling.PARTS}}
        for x, seconds in ((1, 2.0), (2, 2.0), (4, 8.0))
    ]
    assert [ratios["total"] for ratios in scaling.of_linear(rows, "x")] == [1.0, 0.5, 2.0]
    assert [ratios["training"] for ratios in scaling.of_linear(rows, None)] == [1.0, 1.0, 4.0]


@pytest.mark.parametrize(("group", "prompts"), [(1.0, 1.0), (8.0, 8.0)])
def test_shared_prompt_counts_prompts(load: Callable[[str], Any], group: float, prompts: float):
    def row(n: int, length: int, seconds: float) -> Any:
        return {"n": n, "prompt_tokens": length, "seconds": {"loss": {"median": seconds}, "backward": {"median": 0.0}}}

    rows = [row(1, 32, 2.0), row(1, 512, 3.0), row(8, 32, 16.0), row(8, 512, 16.0 + group)]
    assert load("scaling").shared_prompt(rows) == pytest.approx(prompts)


@pytest.mark.parametrize("kind", ["speed", "full", "lora"])
def test_scaling_recipe_of_ranks_is_valid(toy, tmp_path: Path, kind: str):
    assert load_recipe(str(toy("scaling").recipe(tmp_path, 1, kind)), []).stages[0].name == "distil"


def test_limits_by_operation_runs(toy, monkeypatch: pytest.MonkeyPatch):
    small_step(toy, monkeypatch)
    limits, result = toy("limits"), {}
    monkeypatch.setattr(limits, "RACES", 1)
    limits.by_operation(result)
    assert set(result) == {"products", "against_bare", "parts"}
    assert limits.ratio(result) > 0


def test_limits_memory_has_every_part_and_its_floor(toy, monkeypatch: pytest.MonkeyPatch):
    memory = toy("limits_memory")
    sizes = {"PROMPTS": 2, "PROMPT_TOKENS": 4, "NEW_TOKENS": 3, "ROUNDS": 1, "BFLOAT16": (96, 6, 8)}
    for name, value in sizes.items():
        monkeypatch.setattr(memory, name, value)
    answer = memory.answer()
    floors = {row["part"]: row["floor"] for row in answer["memory"]}
    parameters = sum(p.numel() for p in toy("workload").causal_lm("135M").parameters())
    assert floors["weights"] == floors["gradients"] == floors["moments"] / 2 == 4 * parameters
    assert floors["KV cache"] == 2 * 4 * (2 * 7) * 8  # keys and values of 2 rows of 7 tokens, 8 entries in one layer
    assert floors["head gradient"] == 4 * VOCABULARY * 8
    assert set(answer["optimiser"]) == {"opd", "loop"}
    assert 0 < answer["bfloat16"]["cast_error"] < 0.1


class OneStep:
    """A channel that ends the run after its second answer."""

    answers: list[Any]

    def __init__(self) -> None:
        type(self).answers = []

    def send(self, answer: Any) -> None:
        self.answers.append(answer)

    def receive(self) -> Any:
        if len(self.answers) == 2:
            raise EOFError


def test_waiting_worker_answers_after_each_step(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    waiting, common = load("waiting"), load("common")
    monkeypatch.setattr(common, "Channel", OneStep)
    with pytest.raises(EOFError):
        waiting.worker("default", str(waiting.recipe_of("tiny", tmp_path)))
    ready, step = OneStep.answers
    assert ready == {"ready": True}
    assert step["wall"] > 0
    assert step["cpu"] > 0


def test_against_default_bounds_a_step_that_never_ended(load: Callable[[str], Any]):
    place = {"model": "quickstart", "condition": "busy"}
    chosen = {**place, "policy": "chosen", "wall": {"median": 20.0}, "cpu": {"median": 30.0}}
    ratio = load("waiting").against_default
    assert ratio([chosen], *place.values(), "wall") is None
    stuck = {**place, "policy": "default", "none_in": 200}
    assert [ratio([chosen, stuck], *place.values(), part) for part in ("wall", "cpu")] == [0.1, None]
    slow = {**place, "policy": "default", "wall": {"median": 100.0}, "cpu": {"median": 120.0}}
    assert [ratio([chosen, slow], *place.values(), part) for part in ("wall", "cpu")] == [0.2, 0.25]


def test_command_of_this_tree_is_timed(load: Callable[[str], Any]):
    commands = load("commands")
    assert commands.run(commands.NOW, ("--help",))["cpu"] > 0
    with pytest.raises(RuntimeError, match="No such command"):
        commands.run(commands.NOW, ("nothing",))


def test_request_sets_threads_for_itself(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch):
    common = load("common")
    lines = iter(['{"threads": 2, "x": 1}\n', '{"x": 2}\n'])
    monkeypatch.setattr(sys, "stdin", type("Lines", (), {"readline": staticmethod(lambda: next(lines))}))
    channel = common.Channel.__new__(common.Channel)
    seen = [(channel.receive(), torch.get_num_threads()) for _ in range(2)]
    assert seen == [({"x": 1}, 2), ({"x": 2}, common.THREADS)]


def test_report_makes_page_of_recorded_results(load: Callable[[str], Any]):
    report = load("report")
    results = report.load()
    page = report.page(results)
    assert all(title in page for title in ("# Performance", "## Goals", "## Where the memory goes"))
    assert {len(row) for row in report.goals(results)} == {4}


def test_several_teachers_race_gives_ratios(toy, monkeypatch: pytest.MonkeyPatch):
    several = toy("several_teachers")
    for name, value in {"PROMPTS": 2, "PROMPT_TOKENS": 4, "NEW_TOKENS": 3}.items():
        monkeypatch.setattr(several, name, value)
    found = several.race(2)
    losses = {name: {row["loss"] for row in found[name]} for name in ("one", "two")}
    assert all(len(values) == 1 for values in losses.values()), "every round is the same step"
    assert losses["one"] != losses["two"]
    result = several.summary(found)
    assert result["extra"] == pytest.approx(2 * result["two"] - 1)


def test_plan_measures_and_predicts_every_phase(toy, monkeypatch: pytest.MonkeyPatch):
    plan = toy("plan")
    for name, value in {"PROMPTS": 2, "PROMPT_TOKENS": 4, "NEW_TOKENS": 3}.items():
        monkeypatch.setattr(plan, name, value)
    for case in (plan.PLAIN, plan.PLAIN | {"k": 2, "checkpointing": True}):
        row = {
            "case": case,
            "allocator": "kept",
            "measured": plan.measured_step(case),
            "predicted": plan.predicted(case),
        }
        assert set(row["measured"]) == set(row["predicted"]) == set(plan.MEASURED)
        assert plan.table([row]).count("=") == len(plan.MEASURED) + 1
    row |= {"measured": dict.fromkeys(plan.MEASURED, 0)}
    assert plan.cells(row)[-1].endswith("/ 0 = -"), "memory that the process held already"


def test_page_of_scale_has_the_tables_of_layouts(load: Callable[[str], Any]):
    layouts, page = load("layouts"), (FOLDER.parent / "docs" / "scale.md").read_text()
    made = (layouts.signal_rows, layouts.weight_rows, layouts.memory_rows, layouts.time_rows, layouts.limits_rows)
    for rows in made:
        assert layouts.markdown(rows()) in page


def test_signals_reads_both_answers(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys):
    signals = load("signals")
    monkeypatch.setattr(signals, "TOKENS", 4)
    monkeypatch.setattr(sys, "argv", ["signals.py"])
    signals.main()
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "top 64 in JSON",
        "64 given ids by position",
    ]
