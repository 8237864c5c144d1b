"""Values that no run can use: `opd check` refuses each with the key, the value and the remedy, before any weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.runs import CHARACTERS, Ended, command, one_stage, prepare, tiny_model

from opd.recipe import schema
from opd.recipe.schema import Section

Change = Callable[[dict[str, Any]], Any]
INF, NAN = float("inf"), float("nan")
EVALUATE = {"data": {"path": "held_out.jsonl"}}
TWO_TASKS: dict[str, Any] = {
    name: {"data": {"path": "train.jsonl"}, "teacher": "teacher"} for name in ("first", "second")
}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def check(recipe: dict[str, Any], *overrides: str) -> Ended:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    before = sorted(Path().rglob("*"))
    ended = command("check", "recipe.yaml", *overrides)
    assert sorted(Path().rglob("*")) == before, "a check writes nothing"
    return ended


def refused(recipe: dict[str, Any], code: int = 2) -> str:
    ended = check(recipe)
    assert ended.code == code, ended
    return ended.err


def student(**fields: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(one_stage())
    recipe["models"]["student"].update(fields)
    return recipe


def init(**fields: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(one_stage())
    recipe["models"]["student"]["init"].update(fields)
    return recipe


def sampling(**fields: Any) -> dict[str, Any]:
    return one_stage(sampling={"max_completion_length": 3, **fields})


def optimizer(**fields: Any) -> dict[str, Any]:
    return one_stage(optimizer=fields)


def options(method: str, **fields: Any) -> dict[str, Any]:
    return one_stage(method=method, options=fields)


SHORT = "models.student"
NO_DEVICE = "This machine has: cpu"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    # the optimiser
    "rate infinite": (optimizer(learning_rate=INF), "`stages.0.optimizer.learning_rate`: Input should be a finite"),
    "rate nan": (optimizer(learning_rate=NAN), "`stages.0.optimizer.learning_rate`: Input should be"),
    "rate true": (optimizer(learning_rate=True), "learning_rate`: Input should be a number, not true or false"),
    "decay infinite": (optimizer(weight_decay=INF), "`stages.0.optimizer.weight_decay`: Input should be a finite"),
    "norm nan": (optimizer(max_grad_norm=NAN), "`stages.0.optimizer.max_grad_norm`: Input should be greater than 0"),
    "beta of 1": (optimizer(betas=[0.9, 1.0]), "`stages.0.optimizer.betas.1`: Input should be less than 1 (got 1.0)"),
    "beta below 0": (optimizer(betas=[-0.1, 0.9]), "`stages.0.optimizer.betas.0`: Input should be greater than or"),
    "beta nan": (optimizer(betas=[NAN, 0.9]), "`stages.0.optimizer.betas.0`: Input should be"),
    "eps of 0": (optimizer(eps=0), "`stages.0.optimizer.eps`: Input should be greater than 0 (got 0)"),
    "eps negative": (optimizer(eps=-1), "`stages.0.optimizer.eps`: Input should be greater than 0 (got -1)"),
    "eps infinite": (optimizer(eps=INF), "`stages.0.optimizer.eps`: Input should be a finite number"),
    # sampling
    "temperature infinite": (sampling(temperature=INF), "`stages.0.sampling.temperature`: Input should be a finite"),
    "temperature tiny": (sampling(temperature=1e-300), "divided by less than 1e-6, logits overflow: give 0"),
    "stop at nothing": (sampling(stop=[""]), "`stages.0.sampling.stop.0`: String should have at least 1 character"),
    "n beyond 64 bits": (sampling(n=10**30), "`stages.0.sampling.n`: Input should be less than or equal to 92233"),
    "no setting": (one_stage(evaluate={**EVALUATE, "sampling": {}}), "`stages.0.evaluate.sampling`: Dictionary should"),
    "setting named as a path": (
        one_stage(evaluate={**EVALUATE, "sampling": {"a/b": {}}}),
        "`stages.0.evaluate.sampling.a/b.[key]`: String should match pattern",
    ),
    # a method's options
    "method's temperature below 0": (options("reverse_kl", temperature=-1), "`temperature` is -1.0. It divides the"),
    "method's temperature 0": (options("gkd", temperature=0), "`temperature` is 0.0. It divides the logits of"),
    "method's temperature tiny": (options("opd", temperature=1e-300), "give a number from 1e-06 to 1e+06"),
    "method's temperature nan": (options("reverse_kl", temperature=NAN), "option `temperature`: Input should be a fin"),
    "method's temperature infinite": (
        options("topk_reverse_kl", temperature=INF),
        "option `temperature`: Input should",
    ),
    "k true": (options("topk_reverse_kl", k=True), "option `k` is a number (got True)"),
    "option not for a method": (options("vopd+eff_opd", vopd=5), "the options of vopd are 5. Give a mapping"),
    "greedy policy gradient": (
        one_stage(method="grpo", teacher=None, sampling={"n": 2, "temperature": 0}, reward={"name": "exact"}),
        "sampled at temperature 0.0 and scored at 1.0: the gradient would be biased. Set sampling.temperature to 1.0",
    ),
    # new models
    "no head": (init(num_attention_heads=0), f"{SHORT}.init: `num_attention_heads` is 0, and a model needs at least 1"),
    "no width": (init(hidden_size=0), f"{SHORT}.init: `hidden_size` is 0, and a model needs at least 1"),
    "negative width": (init(hidden_size=-16), f"{SHORT}.init: `hidden_size` is -16, and a model needs at least 1"),
    "no layer": (init(num_hidden_layers=0), f"{SHORT}.init: `num_hidden_layers` is 0, and a model needs at least 1"),
    "no position": (init(max_position_embeddings=0), "`max_position_embeddings` is 0, and a model needs at least 1"),
    "heads that do not fit": (init(num_attention_heads=3), "The hidden size (16) is not a multiple of the number of"),
    "key heads that do not fit": (init(num_key_value_heads=3), "The size of tensor a (2) must match the size"),
    "unknown activation": (init(hidden_act="nope"), "makes no llama model of `init`: KeyError: 'nope'. Correct models"),
    "unknown dtype": (init(dtype="nope"), "makes no llama model of `init`: AttributeError: module 'torch' has no"),
    "a method as a key": (
        init(to_dict=5),
        f"{SHORT}.init: a llama config has no 'to_dict'. Did you mean 'return_dict'",
    ),
    "kind is a list": (init(model_type=["llama"]), f"{SHORT}.init needs `model_type`, e.g. llama; got ['llama']"),
    "padding beyond the ids": (init(pad_token_id=500), "`pad_token_id` is 500, and the vocabulary has the ids 0 to 14"),
    "end beyond the ids": (init(eos_token_id=[1, 500]), "`eos_token_id` is [1, 500], and the vocabulary has the ids"),
    "logits not finite": (init(rms_norm_eps=-1.0), "(largest logit nan)"),
    "attention of a new model": (student(attn_implementation="nope"), 'Specified `attn_implementation="nope"` is not'),
    "tokenizer that is not there": (
        student(tokenizer="./nope"),
        f"{SHORT}.tokenizer: nope does not exist. Give a token",
    ),
    "tokenizer at no hub": (
        student(tokenizer="nope/nope"),
        "no tokenizer could be loaded from nope/nope, which is not",
    ),
    "tokenizer is a file": (student(tokenizer="train.jsonl"), f"{SHORT}.tokenizer: train.jsonl is not a folder"),
    "folder without a tokenizer": (
        student(tokenizer="."),
        f"{SHORT}.tokenizer: no tokenizer could be loaded from ., w",
    ),
    "tokenizer without characters": (student(tokenizer={"characters": ""}), "String should have at least 1 character"),
    "seed below 0": (student(seed=-1), "`models.student.seed`: Input should be greater than or equal to 0"),
    "seed beyond 64 bits": (one_stage() | {"seed": 2**63}, "`seed`: Input should be less than or equal to 9223372036"),
    "seed of a folder": (
        one_stage() | {"models": {"teacher": tiny_model(1), "student": {"path": "./m", "seed": 3}}},
        "`path` does not read `seed`: leave it out",
    ),
    "LoRA of your own scorer": (
        one_stage() | {"models": {"student": tiny_model(), "teacher": {"scorer": "m:f", "lora": {"rank": 2}}}},
        "`scorer` does not read `lora`: leave it out",
    ),
    # LoRA
    "unknown module": (student(lora={"target_modules": ["q_prj"]}), "no module 'q_prj' (target_modules). Did you mean"),
    "one unknown module": (
        student(lora={"target_modules": ["q_proj", "nope"]}),
        f"{SHORT}.lora: the model has no module 'nope' (target_modules). Give a list of names, of: down_proj, gate_pro",
    ),
    "module as a text": (
        student(lora={"target_modules": "q_proj"}),
        "A text is one regular expression for whole names",
    ),
    "pattern that is none": (student(lora={"target_modules": "(["}), "'([', which does not compile: unterminated"),
    "no module": (student(lora={"target_modules": []}), "it names no module: give a list of names, or all"),
    "module without weights": (student(lora={"target_modules": ["input_layernorm"]}), "LlamaRMSNorm((16,), eps=1e-06)"),
    "output layer": (
        student(lora={"target_modules": ["lm_head"]}),
        "Leave the output layer out of the LoRA target mod",
    ),
    "alpha infinite": (student(lora={"alpha": INF}), "`models.student.lora.alpha`: Input should be a finite number"),
    # devices
    "unknown device": (student(device="gpu"), f"{SHORT}.device is 'gpu', which cannot be used: Expected one of cpu"),
    "device that holds nothing": (student(device="meta"), "'meta', which cannot be used: it holds no numbers"),
    "device not built in": (student(device="xla"), f"{SHORT}.device is 'xla', which cannot be used: Could not run"),
    # names and paths
    "stage is a file of the run": (one_stage(name="recipe.yaml"), "A stage cannot be named 'recipe.yaml'"),
    "long stage": (one_stage(name="a" * 300), "`stages.0.name`: String should have at most 100 characters"),
    "long name": (one_stage() | {"name": "a" * 300}, "`name`: String should have at most 100 characters"),
    "no folder": (one_stage() | {"output_dir": ""}, "`output_dir`: String should have at least 1 character"),
    "no character of a path": (one_stage() | {"output_dir": "a\0b"}, "The path 'a\\x00b' holds a character that no"),
    "home of no user": (one_stage() | {"output_dir": "~nouser/x"}, "begins with ~nouser, a home folder that does not"),
    "path of no package": (student(init=None, tokenizer=None, seed=None, path="package:"), "Write package:NAME/FILE"),
    "rows of no package": (one_stage(data={"path": "package:a..b/x.jsonl"}), "the package 'a..b' is not installed"),
    # texts
    "placeholder with !r": (
        one_stage(data={"path": "train.jsonl", "template": "{prompt!r}"}),
        "formats the field {prompt} with '!r': a model would read another text than the data's. Write {prompt} alone",
    ),
    "placeholder with a width": (one_stage(data={"path": "x", "template": "{prompt:>9}"}), "{prompt} with ':>9'"),
    "placeholder with a field": (one_stage(data={"path": "x", "template": "{prompt:{prompt}}"}), "with ':{prompt}'"),
    "placeholder of a context": (
        one_stage(method="context_distillation", teacher=None, options={"template": "{privileged_context!r}{prompt}"}),
        "formats the field {privileged_context} with '!r'",
    ),
    "template that divides by 0": (
        student(chat_template="{{ messages[0].content }}{{ 1 / 0 }}")
        | {"stages": one_stage(data={"path": "train.jsonl", "chat": True})["stages"]},
        "refused prompt 0 (roles: user): division by zero",
    ),
    "judge without a template": (
        one_stage(
            method="grpo",
            teacher=None,
            sampling={"n": 2, "max_completion_length": 3},
            reward={"name": "rubric", "options": {"column": "response"}, "judge": {"lm": "teacher"}},
        ),
        "teacher is the judge of the reward, and its questions are conversations, but its tokenizer has no chat templa",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_check_refuses_bad_value(case: str):
    recipe, said = BAD[case]
    err = refused(recipe)
    assert said in err, err
    assert err.startswith(("ConfigError: ", "DataError: "))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:9"])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_check_refuses_gpu_that_is_not_there(device: str, name: str):
    recipe = one_stage()
    recipe["models"][name]["device"] = device
    err = refused(recipe)
    assert f"ConfigError: models.{name}.device is {device!r}, which cannot be used: there is no such device." in err
    assert NO_DEVICE in err


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("/dev/null", "/dev/null is a file, and a run needs a folder"),
        ("train.jsonl", "train.jsonl is a file, and a run needs a folder. Use another output_dir=..."),
        ("train.jsonl/x", "train.jsonl/x cannot be written (Not a directory)"),
        ("a" * 300, "cannot be written (File name too long)"),
    ],
)
def test_check_refuses_output_dir_that_is_no_folder(folder: str, said: str):
    err = refused(one_stage() | {"output_dir": folder}, code=1)
    assert err.startswith("RunError: ")
    assert said in err


MODELS = {"student": tiny_model(2), "teacher": tiny_model(1), "spare": {"path": "./not/there"}}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (one_stage() | {"models": MODELS}, "no stage uses models.spare: nothing in it is checked"),
        (
            one_stage(data=None, teacher=None, tasks={**TWO_TASKS, "rare": {**TWO_TASKS["first"], "share": 1e-300}}),
            "distil: task rare has the share 1e-300 and no prompt in the 2 steps: 1e+300 steps come before its first",
        ),
        (
            optimizer(warmup_steps=20, learning_rate=1e-3),
            "distil: optimizer.warmup_steps is 20 and steps is 2, so the learning rate ends at 10% of 0.001",
        ),
        (
            sampling(temperature=0, n=2),
            "distil: sampling draws 2 responses to each prompt at temperature 0, and they are all the same",
        ),
        (
            one_stage(evaluate={**EVALUATE, "sampling": {"greedy": {"temperature": 0, "n": 3}}}),
            "distil: evaluate.sampling.greedy draws 3 responses to each prompt at temperature 0",
        ),
    ],
    ids=["unused model", "share of a task", "warm-up beyond the end", "greedy responses", "greedy evaluation"],
)
def test_check_shows_settings_without_effect(recipe: dict[str, Any], said: str):
    ended = check(recipe)
    assert ended.code == 0, ended.err
    assert said in ended.out


def test_train_shows_settings_without_effect():
    Path("recipe.yaml").write_text(yaml.safe_dump(one_stage() | {"models": MODELS}, sort_keys=False))
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    assert "no stage uses models.spare" in ended.out


def test_paths_begin_at_home(monkeypatch: pytest.MonkeyPatch):
    """Recipe, output folder, data, tokenizer, template, and in the end the trained model of another run."""
    home = Path("home").absolute()
    prepare(home, one_stage())
    monkeypatch.setenv("HOME", str(home))
    (home / "short.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    recipe = one_stage(data={"path": "~/train.jsonl"}, evaluate={"data": {"path": "~/held_out.jsonl"}})
    recipe["models"]["student"]["chat_template"] = "~/short.jinja"
    (home / "first.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": "~/first"}, sort_keys=False))
    ended = command("train", "~/first.yaml")
    assert ended.code == 0, ended.err
    trained = "~/first/distil/model"
    recipe["models"]["teacher"]["tokenizer"] = trained
    recipe["models"]["student"] = {"path": trained}
    (home / "second.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": "~/second"}, sort_keys=False))
    ended = command("train", "~/second.yaml")
    assert ended.code == 0, ended.err
    assert (home / "second" / "distil" / "model" / "config.json").exists()
    assert command("eval", trained, "~/held_out.jsonl", "--max-completion-length", "2").code == 0
    assert not Path("~").exists()


def test_every_number_of_a_recipe_refuses_truth_and_infinity():
    """A field that is added later, too: pydantic alone reads true as 1, and infinity as a number."""
    kinds = {int: 0, float: 0}
    for section in (one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, Section)):
        for name, field in section.model_fields.items():
            for kind in kinds:
                bare = field.annotation in (kind, kind | None)
                kinds[kind] += bare
                errors = _errors(section, name, True) if bare else []
                assert not bare or "boolean" in errors, f"{section.__name__}.{name} takes true for 1"
                if bare and name not in ("max_grad_norm", "every_minutes"):  # infinite: not clipped, never saved
                    assert set(_errors(section, name, INF)) & {"finite_number", "int_from_float", "int_type"}, name
    assert kinds[int] >= 20
    assert kinds[float] > 8


def _errors(section: type[Section], name: str, value: Any) -> list[str]:
    from pydantic import ValidationError

    try:
        section.model_validate({name: value})
    except ValidationError as error:
        return [one["type"] for one in error.errors() if one["loc"][:1] == (name,)]
    return []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "model", "held_out.jsonl", "--seed", "-1"), "Input should be greater than or equal to 0"),
        (("doctor", "recipe.yaml", "--seed", "-1"), "Input should be greater than or equal to 0"),
        (("probe", "recipe.yaml", "--seed", "-1"), "Input should be greater than or equal to 0"),
        (("probe", "recipe.yaml", "--visits", "3"), "opd probe got --visits 3. With fewer than 10 continuations"),
        (("probe", "recipe.yaml", "--teachers", "other"), "--teachers other: the recipe has no such model"),
        (("probe", "recipe.yaml", "--tau", "nan"), "opd probe got --tau nan"),
        (("eval", "", "held_out.jsonl"), "opd eval got an empty path of a model"),
        (("eval", "model", "held_out.jsonl", "--teacher", ""), "opd eval got an empty path of a model"),
        (("eval", "~nouser/x", "held_out.jsonl"), "begins with ~nouser, a home folder that does not exist"),
        (("check", "."), "There is no recipe at ."),
        (("check", "a\0b"), "The path 'a\\x00b' holds a character that no path has"),
        (("check", "recipe.yaml", "stages.².steps=1"), "Override stages.²: no such entry"),
        (("check", "recipe.yaml", "a..b=1"), "unknown key `a`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_commands_refuse_bad_arguments(arguments: tuple[str, ...], said: str):
    ended = command(*arguments)
    assert ended.code == 2
    assert said in ended.err, ended.err


def test_gradient_norm_may_be_infinite():
    assert check(optimizer(max_grad_norm=INF)).code == 0


def test_new_model_takes_implementation_of_attention():
    from opd.models.loading import load_model
    from opd.recipe.schema import ModelSpec

    lm = load_model(ModelSpec(**tiny_model(attn_implementation="eager")), name="m")
    assert lm.causal_lm.config._attn_implementation == "eager"
    assert set(CHARACTERS) <= set(lm.tokenizer.get_vocab())
