"""The export of a stage: tried before the training, what a recipe can choose, and the card."""

import json
import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.runs import Forks, Strike, assert_same, forbid, one_stage, prepare, tiny_model

import opd
from opd.errors import ConfigError, RunError, TrainingError
from opd.models import saving
from opd.models.loading import load_model
from opd.recipe.load import load_recipe
from opd.recipe.schema import Lora, ModelSpec, Recipe
from opd.runs.card import metadata_of, write_card
from opd.runs.stages import run_recipe

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "opd.yaml")
STAGE = RECIPE.stages[-1]
LORA = {"rank": 2, "alpha": 8.0}
IDS = torch.tensor([[2, 3, 4, 5, 12]])
FAST = {"optimizer": {"learning_rate": 0.05}}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `base/`, a model in bfloat16, and the data of `one_stage`."""
    folder = prepare(tmp_path / "work", one_stage())
    monkeypatch.chdir(folder)
    saving.save(load_model(ModelSpec(**tiny_model(2)), name="base"), folder / "base", torch.bfloat16)
    return folder


def recipe(*stages: dict[str, Any], student: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    """A recipe of `one_stage` with the student of `base/`; each of `stages` changes fields of one stage."""
    whole = one_stage(**FAST, **fields)
    described = [{**whole["stages"][0], **stage} for stage in stages or ({},)]
    models = {**whole["models"], "student": student or {"path": "base", "lora": LORA}}
    Path("recipe.yaml").write_text(yaml.safe_dump({**whole, "models": models, "stages": described}))
    return load_recipe("recipe.yaml")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def merged(folder: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_adapter(folder: str) -> Any:
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- tried before the training ---------------------------------------------------------------------------------------


def test_distill_refuses_invalid_generation_config_first(monkeypatch: pytest.MonkeyPatch):
    student = load_model(ModelSpec(**tiny_model(2)), name="student")
    model: Any = student.model
    model.generation_config.temperature = 0.7
    forbid(monkeypatch, "opd.runs.stages.train")
    with pytest.raises(ConfigError, match=r"student could not be saved after the training: model\.generation_config"):
        opd.distill(
            student=model,
            teacher=load_model(ModelSpec(**tiny_model(1)), name="teacher").model,
            tokenizer=student.tokenizer,
            prompts=["1+1="],
            steps=1,
            prompts_per_step=1,
            quiet=True,
        )


def test_train_refuses_target_that_is_a_file(monkeypatch: pytest.MonkeyPatch):
    Path("run/distil").mkdir(parents=True)
    forbid(monkeypatch, "opd.runs.stages.train")
    made = recipe()
    run = Path("run")
    (run / "recipe.yaml").write_text(opd.recipe.load.dump(made))  # type: ignore[attr-defined]
    (run / "distil/model").write_text("notes")
    with pytest.raises(
        RunError, match=r"distil/model is where the trained model will be saved, and it is not a folder"
    ):
        run_recipe(made)


def test_train_keeps_weights_when_config_breaks_in_training(monkeypatch: pytest.MonkeyPatch):
    """The weights are in the folder that the message names, and the corrected run saves them."""
    real = opd.runs.stages.train  # type: ignore[attr-defined]

    def breaking(stage: Any) -> Any:
        outcome = real(stage)
        stage.student.causal_lm.generation_config.temperature = 0.7
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr("opd.runs.stages.train", breaking)
        with pytest.raises(RunError, match=r"run/distil/\.writing-model has the weights, .*generation_config cannot"):
            run_recipe(recipe())
    assert not Path("run/distil/done.json").exists()
    kept = load_file("run/distil/.writing-model/model.safetensors")
    run_recipe(recipe())
    saved = load_file("run/distil/model/model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())
    assert not Path("run/distil/.writing-model").exists()


def test_train_raises_run_error_when_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(RunError, match=r"\.writing-model cannot be written \(.*No space left.* same command again"):
            run_recipe(recipe())
    run_recipe(recipe())
    assert Path("run/distil/model/model.safetensors").exists()


def test_train_marks_nothing_done_when_saved_model_differs(monkeypatch: pytest.MonkeyPatch):
    real = saving.save

    def wrong(lm: Any, folder: Path, dtype: Any = None) -> None:
        real(load_model(ModelSpec(**tiny_model(7)), name="other"), folder, dtype)

    with monkeypatch.context() as patch:
        patch.setattr("opd.runs.export.saving.save", wrong)
        with pytest.raises(
            TrainingError,
            match=r"is not the model that was trained: 9 of 12 weights are others, e\.g\. model\.embed_tok",
        ):
            run_recipe(recipe())
    assert not Path("run/distil/done.json").exists()
    run_recipe(recipe())
    assert json.loads(Path("run/distil/done.json").read_text())["saved_kl"] < 0.05


# --- what a recipe can choose ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["merged", "adapter", "both"])
def test_save_writes_chosen_folders(save: str):
    run = run_recipe(recipe(save=save))
    there = {name for name in ("model", "adapter") if Path(f"run/distil/{name}").exists()}
    assert there == ({"model", "adapter"} if save == "both" else {"adapter" if save == "adapter" else "model"})
    trained = logits(run.student)
    assert float((logits(merged("base")) - trained).abs().max()) > 0.02, "the training mattered"
    if "adapter" in there:
        described = json.loads(Path("run/distil/adapter/adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == str(Path("base").absolute())
        torch.testing.assert_close(logits(with_adapter("run/distil/adapter")), trained, atol=1e-5, rtol=0)
    if "model" in there:
        torch.testing.assert_close(logits(merged("run/distil/model")), trained, atol=0.02, rtol=0)
    again = run_recipe(recipe(save=save)).student  # a finished run is loaded
    expected = logits(merged("run/distil/model", dtype=torch.float32)) if "model" in there else trained
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


def test_save_adapter_keeps_merged_model_for_later_stage(capsys: pytest.CaptureFixture[str]):
    from opd.runs.checks import check_stages
    from opd.runs.prepare import Given

    made = recipe({"name": "first"}, {"name": "second"}, save="adapter")
    lines = check_stages(made, Given()).lines
    assert any("the merged model is saved beside the adapter" in line for line in lines["first"])
    assert not any("merged" in line for line in lines["second"])
    run = run_recipe(made)
    assert Path("run/first/model").exists()
    assert Path("run/first/adapter").exists()
    assert not Path("run/second/model").exists()
    described = json.loads(Path("run/second/adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(Path("run/first/model").absolute())
    torch.testing.assert_close(logits(with_adapter("run/second/adapter")), logits(run.student), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"path": "base"}, "trains its full weights. Set `save: merged`, or give models.student a `lora` section"),
        (tiny_model(2, lora=LORA), r"would belong to weights that no folder has"),
    ],
    ids=["no adapter", "no base"],
)
def test_check_save_refuses_adapter(student: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe(save="adapter", student=student))
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, torch.bfloat16), ({"save_dtype": "float32"}, torch.float32), ({"save_dtype": "float16"}, torch.float16)],
)
def test_save_dtype_is_origins_unless_chosen(fields: dict[str, Any], expected: torch.dtype):
    """Trained in float32 from a model in bfloat16."""
    run = run_recipe(recipe(student={"path": "base"}, **fields))
    weights = load_file("run/distil/model/model.safetensors")
    trained = run.student.state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert all(torch.equal(weights[name], trained[name].to(expected)) for name in weights)


def test_save_dtype_of_new_model_is_trained_one():
    run_recipe(recipe(student=tiny_model(2)))
    assert {t.dtype for t in load_file("run/distil/model/model.safetensors").values()} == {torch.float32}


def test_run_notes_share_that_lora_adapts(capsys: pytest.CaptureFixture[str]):
    from opd.stage.progress import Progress

    run_recipe(recipe(student={"path": "base", "lora": {**LORA, "target_modules": ["q_proj"]}}), progress=Progress())
    assert "distil: student: LoRA adapts 1 of 7 weight matrices" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "noted"), [(1e-5, True), (0.05, False)])
def test_run_notes_updates_that_rounding_undoes(rate: float, noted: bool, capsys: pytest.CaptureFixture[str]):
    """In bfloat16 two steps of 1e-5 change few of the weights, whose size is 0.02."""
    from opd.stage.progress import Progress

    made = recipe({"optimizer": {"learning_rate": rate}}, student={"path": "base"})
    run_recipe(made, progress=Progress())
    assert ("distil: the saved model is rounded to bfloat16 and differs" in capsys.readouterr().out) == noted


def test_finish_gives_equal_folders_when_killed(tmp_path: Path, forks: Forks):
    described = one_stage(save="both", **FAST)
    described["models"]["student"] = {"path": "base", "lora": LORA}
    whole, killed = (prepare(tmp_path / name, described) for name in ("whole", "killed"))
    for folder in (whole, killed):
        shutil.copytree("base", folder / "base")
    assert forks.start(whole, "train", "recipe.yaml").code == 0
    strike = Strike(call="opd.runs.export.saving.save_adapter", when="after")
    assert forks.start(killed, "train", "recipe.yaml", strike=strike).code == -signal.SIGKILL
    assert not (killed / "run/distil/done.json").exists()
    assert forks.start(killed, "train", "recipe.yaml").code == 0
    for folder in (whole, killed):  # the one file with an absolute path
        file = folder / "run/distil/adapter/adapter_config.json"
        assert str(folder / "base") in file.read_text()
        file.write_text(file.read_text().replace(str(folder), ""))
    assert_same(killed / "run", whole / "run")


def test_finish_saves_adapter_when_processes_are_two(tmp_path: Path, forks: Forks):
    described = one_stage(save="both", **FAST)
    described["models"]["student"] = {"path": "base", "lora": LORA}
    folder = prepare(tmp_path / "pair", described)
    shutil.copytree("base", folder / "base")
    ended = forks.start(folder, "train", "recipe.yaml", processes=2)
    assert ended.code == 0, ended.err
    adapter, whole = (
        logits(with_adapter(str(folder / "run/distil/adapter"))),
        logits(merged(str(folder / "run/distil/model"))),
    )
    torch.testing.assert_close(adapter, whole, atol=0.02, rtol=0)
    assert float((adapter - logits(merged("base"))).abs().max()) > 0.02, "the training mattered"


def test_run_files_follow_umask():
    before = os.umask(0o002)
    try:
        run_recipe(recipe(save="both"))
    finally:
        os.umask(before)
    modes = {str(file): stat.S_IMODE(file.stat().st_mode) for file in Path("run").rglob("*") if file.is_file()}
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o664} == {}


# --- the card --------------------------------------------------------------------------------------------------------


def card(folder: Path, *rows: dict[str, float]) -> ModelCard:
    write_card(folder, RECIPE, STAGE, rows)
    return ModelCard.load(folder / "README.md")


def test_write_card_has_metadata_and_settings(tmp_path: Path):
    written = card(tmp_path)
    assert written.data.to_dict() == {"library_name": "transformers", "tags": ["on-policy-distillation", "opd"]}
    assert written.text.startswith(
        f"\n# opd: {STAGE.name}\n\nTrained by `opd` with the method `opd`, {STAGE.steps} steps"
    )
    settings = yaml.safe_load(written.text.split("```yaml\n")[1].split("```")[0])
    assert set(settings["models"]) == set(RECIPE.models)
    assert settings["stage"]["name"] == STAGE.name
    assert "held out" not in written.text


def test_write_card_has_a_column_for_each_evaluation(tmp_path: Path):
    written = card(
        tmp_path,
        {"step": 0, "eval/reward": 0.25, "train/loss": 1.0},
        {"step": 1, "train/loss": 1.0},
        {"step": 5, "eval/reward": 0.5, "eval/kl": 0.123456},
    )
    table = "| held out | step 0 | step 5 |\n|---|---|---|\n| kl |  | 0.1235 |\n| reward | 0.25 | 0.5 |\n\n"
    assert table in written.text


def test_metadata_of_has_base_model_and_license_of_origin(work: Path):
    """The origin lies in the hub's cache, as a download leaves it."""
    snapshot = work / "hub/models--some-owner--A-Model.v2/snapshots/0123abc"
    saving.save(load_model(ModelSpec(**tiny_model(2)), name="base"), snapshot)
    (snapshot / "README.md").write_text(
        "---\nlicense: other\nlicense_name: open-ish\nlicense_link: https://example.org/l\nlanguage: en\n---\n# M\n"
    )
    made = recipe(student={"path": str(snapshot), "lora": LORA}, data={"path": "some-owner/sums"})
    expected = {
        "base_model": "some-owner/A-Model.v2",
        "datasets": ["some-owner/sums"],
        "library_name": "peft",
        "license": "other",
        "license_name": "open-ish",
        "license_link": "https://example.org/l",
        "tags": ["on-policy-distillation", "opd", "lora"],
    }
    assert metadata_of(made, made.stages[0], "adapter", snapshot).to_dict() == expected


def test_distill_card_names_origin_of_model_object(work: Path):
    snapshot = work / "hub/models--some-owner--A-Model/snapshots/0123abc"
    saving.save(load_model(ModelSpec(**tiny_model(2)), name="base"), snapshot)
    student = load_model(ModelSpec(path=str(snapshot), lora=Lora(rank=2)), name="student")
    teacher = load_model(ModelSpec(**tiny_model(1)), name="teacher")
    run = opd.distill(
        student=student.model,
        teacher=teacher.model,
        tokenizer=student.tokenizer,
        prompts=["1+1="],
        steps=1,
        prompts_per_step=1,
        save="both",
        quiet=True,
    )
    for kind in ("model", "adapter"):
        written = ModelCard.load(run.folder / "distill" / kind / "README.md")
        assert written.data.to_dict()["base_model"] == "some-owner/A-Model"
    described = json.loads((run.folder / "distill/adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(snapshot)


def test_metadata_of_passes_on_base_model_of_local_folder():
    Path("base/README.md").write_text("---\nbase_model: some-owner/first\nlicense: mit\n---\n")
    made = recipe({"name": "first"}, {"name": "second"})
    for stage in made.stages:
        found = metadata_of(made, stage, "merged", Path("base")).to_dict()
        assert (found["base_model"], found["license"]) == ("some-owner/first", "mit")
        assert "datasets" not in found, "the data are a local file"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("/data/models/base", None),  # as PEFT writes it of a local base
        ("[some-owner/one, /data/two, some-owner/three]", ["some-owner/one", "some-owner/three"]),
        ("[/data/two]", None),
        ("5", None),
    ],
)
def test_metadata_of_names_base_models_of_the_hub_alone(named: str, expected: Any):
    """The hub refuses the commit of a card with another base model."""
    Path("base/README.md").write_text(f"---\nbase_model: {named}\n---\n")
    made = recipe()
    assert metadata_of(made, made.stages[0], "merged", Path("base")).to_dict().get("base_model") == expected
