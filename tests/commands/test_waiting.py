"""How threads wait: what is chosen, that the user's word counts, and that it is set before torch loads."""

import json
import math
import os
import subprocess
import sys

import pytest
from support.runs import ENVIRONMENT, tiny_model

from opd.commands import waiting
from opd.commands.waiting import Load, choose, largest, load_between, parameters_of, settled, threads
from opd.recipe.schema import ModelSpec

QUIET, BUSY = Load(0.05, 2), Load(1.0, 2)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is chosen")


def test_choose_spins_when_small_and_quiet():
    choice = choose(5e6, QUIET, threads=2)
    assert not choice.passive
    assert choice.line == "threads wait spinning: the machine is quiet (0.1 of 2 cores in use) and the models are small"


def test_choose_sleeps_when_busy():
    choice = choose(5e6, BUSY, threads=2)
    assert choice.passive
    assert choice.line == "threads wait asleep: the machine is busy (1.0 of 2 cores in use)"


@pytest.mark.parametrize("load", [QUIET, BUSY, None])
def test_choose_sleeps_when_large(load):
    assert choose(1.35e8, load, threads=2).passive


def test_choose_sleeps_when_load_is_unknown():
    assert choose(5e6, None, threads=2).passive


def test_choose_spins_when_others_leave_cores():
    assert not choose(5e6, Load(1.0, 4), threads=3).passive
    assert choose(5e6, Load(1.3, 4), threads=3).passive


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_settled_is_true_when_the_user_has_chosen(name):
    assert settled({name: "0"}, cores=2)


@pytest.mark.parametrize(("variables", "cores"), [({"OMP_NUM_THREADS": "1"}, 2), ({}, 1), ({"WORLD_SIZE": "2"}, 2)])
def test_settled_is_true_when_nothing_is_measured(variables, cores):
    assert settled(variables, cores)


def test_settled_is_false_when_there_is_a_choice(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert not settled({"OMP_NUM_THREADS": "2", "WORLD_SIZE": "1"}, cores=4)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert settled({}, cores=4)


@pytest.mark.parametrize(("text", "count"), [("", 8), ("3", 3), ("2,4", 2), ("0", 8), ("many", 8)])
def test_threads_follow_the_users_number(text, count):
    assert threads({"OMP_NUM_THREADS": text}, cores=8) == count


def stat(*cores: tuple[int, int, int]) -> str:
    """/proc/stat with user, idle and steal ticks by core."""
    rows = [f"cpu{core} {user} 0 0 {idle} 0 0 0 {steal} 0 0" for core, (user, idle, steal) in enumerate(cores)]
    return "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5 0 0"])


def test_load_between_counts_own_cores_alone():
    before, after = stat((100, 100, 0), (100, 100, 0)), stat((105, 110, 5), (100, 120, 0))
    assert load_between(before, after, {0, 1}) == Load(0.5, 2)
    assert load_between(before, after, {1}) == Load(0.0, 1)


def test_load_between_is_none_when_a_core_is_missing():
    assert load_between(stat((1, 1, 0)), stat((2, 2, 0)), {0, 1}) is None


def test_load_between_is_none_when_no_time_has_passed():
    assert load_between(stat((1, 1, 0)), stat((1, 1, 0)), {0}) is None


def test_measured_load_is_none_when_there_is_no_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "STAT", tmp_path / "stat")
    assert waiting.measured_load(0) is None


def test_parameters_of_a_folder_follow_its_files(tmp_path):
    for name, dtype in (("whole", "float32"), ("half", "bfloat16")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"dtype": dtype}))
        (tmp_path / name / "model.safetensors").write_bytes(bytes(800))
    assert parameters_of(ModelSpec(path=str(tmp_path / "whole"))) == 200
    assert parameters_of(ModelSpec(path=str(tmp_path / "half"))) == 400


def test_parameters_of_a_gguf_file_follow_its_size(tmp_path):
    (tmp_path / "model.gguf").write_bytes(bytes(500))
    assert parameters_of(ModelSpec(path=str(tmp_path / "model.gguf"))) == 800


def test_parameters_of_a_config_count_embedding_and_layers():
    spec = ModelSpec(init={"hidden_size": 96, "num_hidden_layers": 4, "vocab_size": 49152}, tokenizer="any/folder")
    assert parameters_of(spec) == 49152 * 96 + 12 * 4 * 96**2
    assert parameters_of(ModelSpec(**tiny_model())) < 10_000


def test_parameters_of_a_config_are_many_when_left_out():
    assert parameters_of(ModelSpec(init={"model_type": "llama"}, tokenizer="any/folder")) == math.inf


@pytest.mark.parametrize("spec", [{"path": "/no/such/folder"}, {"path": "package:no_such_package/file"}])
def test_parameters_of_raises_nothing_when_a_path_is_wrong(spec):
    assert parameters_of(ModelSpec(**spec)) == 0


def test_largest_leaves_out_what_a_stage_leaves():
    assert largest([ModelSpec(from_stage="teacher"), ModelSpec(path="org/a-hub-id")]) == math.inf
    assert largest([ModelSpec(from_stage="teacher")]) == 0
    assert largest([]) == 0


def started(folder, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line on two cores' worth of threads; what it has set is printed when torch is first asked for."""
    code = """
import builtins, os, sys
real = builtins.__import__
def spied(name, *rest, **more):
    if name.split(".")[0] == "torch" and "torch" not in sys.modules:
        print("torch loads with", os.environ.get("OMP_WAIT_POLICY"), flush=True)
        os._exit(0)
    return real(name, *rest, **more)
builtins.__import__ = spied
from opd.commands import waiting
waiting.own_cores = lambda: {0, 1}
waiting.measured_load = lambda: waiting.Load(float(os.environ["USED"]), 2)
from opd.cli import main
sys.argv[0] = "opd"
main()
"""
    unset = ("OMP_NUM_THREADS", *waiting.SET_BY_USERS, "WORLD_SIZE")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in unset} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n')
    stage = {"name": "teach", "train": "m", "method": "sft", "data": {"path": "train.jsonl"}, "steps": 1}
    tree = {"name": "tiny", "models": {"m": tiny_model()}, "stages": [stage]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    return tmp_path


@LINUX
def test_train_sets_the_policy_before_torch_loads(recipe):
    assert started(recipe, "train", "recipe.yaml", USED="1").stdout.splitlines() == [
        "threads wait asleep: the machine is busy (1.0 of 2 cores in use)",
        "torch loads with passive",
    ]


@LINUX
def test_train_sets_nothing_when_quiet(recipe):
    line, loads = started(recipe, "train", "recipe.yaml", USED="0").stdout.splitlines()
    assert line.startswith("threads wait spinning: ")
    assert loads == "torch loads with None"


@pytest.mark.parametrize(
    "variables", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"OMP_NUM_THREADS": "1"}]
)
def test_train_says_nothing_when_the_user_has_chosen(recipe, variables):
    done = started(recipe, "train", "recipe.yaml", USED="1", **variables)
    assert done.stdout == f"torch loads with {variables.get('OMP_WAIT_POLICY')}\n"
    assert done.stderr == ""


@LINUX
@pytest.mark.parametrize(
    "arguments", [("doctor", "recipe.yaml", "--json"), ("eval", "./model", "train.jsonl"), ("study", "drift")]
)
def test_commands_say_the_choice_on_stderr(recipe, arguments):
    done = started(recipe, *arguments, USED="1")
    assert done.stdout == "torch loads with passive\n"
    assert done.stderr == f"{arguments[0]}: threads wait asleep: the machine is busy (1.0 of 2 cores in use)\n"


@LINUX
@pytest.mark.parametrize("arguments", [("check", "recipe.yaml"), ("study",), ("methods",)])
def test_commands_without_models_choose_nothing(recipe, arguments):
    done = started(recipe, *arguments, USED="1")
    assert "threads wait" not in done.stdout + done.stderr


def test_set_waiting_leaves_a_process_that_has_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr(waiting, "measured_load", lambda: pytest.fail("nothing is to be measured"))
    before = dict(os.environ)
    waiting.set_waiting(pytest.fail)
    assert dict(os.environ) == before
