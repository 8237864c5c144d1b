"""`opd report`: one file, its policy, its library, its size, and what it does with old, unfinished and hostile runs."""

import base64
import hashlib
import json
import re
import shutil
import time
from importlib.resources import files

import numpy as np
import pytest
from support.run_folders import FakeRun, write
from support.runs import command

from opd.errors import ConfigError
from opd.stage.claim import HOLDER
from opd.viewer import page
from opd.viewer.content import Options, block_of, live_content, stage_content
from opd.viewer.facts import head_of, opened_first
from opd.viewer.pack import opened, slices
from opd.viewer.read import read_run
from opd.viewer.report import write_report

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "{{ 7 * 7 }} {% raw %}",
    "\u202eright to left\u202c \u200bzero",
    "\x1b[31mred\x00\x07",
    "' onmouseover='x' \"",
    "&lt;b&gt; &amp;amp;",
    "long " * 20_000,
)


def test_library_is_the_one_of_the_package():
    """The hashes of the files in uPlot's npm package, version 1.6.32."""
    assets = files("opd.viewer").joinpath("assets")
    listed = assets.joinpath("uPlot.txt").read_text()
    assert "uPlot 1.6.32" in listed
    for name, digest in (
        ("uPlot.iife.min.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
        ("uPlot.min.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
    ):
        assert hashlib.sha256(assets.joinpath(name).read_bytes()).hexdigest() == digest
        assert f"{digest}  {name}" in listed
    assert "MIT" in assets.joinpath("uPlot.LICENSE").read_text()


def test_own_script_parses_no_markup_and_runs_no_text():
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setTimeout\(['\"]|srcdoc"
    assert not re.findall(forbidden, page.script())
    assert not re.findall(r"\|\s*safe|\bon[a-z]+=|style=", "".join(page.asset(f"{n}.html.j2") for n in page.TEMPLATES))


def test_policy_allows_the_pages_own_script_alone(tmp_path):
    text = write_report(write(tmp_path / "run")).path.read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    rules = policy[1].replace("&#39;", "'")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert (len(scripts), len(styles)) == (1, 1)
    for kind, content in (("script", scripts[0]), ("style", styles[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in rules
    assert rules.startswith("default-src 'none'")
    assert "unsafe" not in rules
    assert "connect-src" not in rules


def test_hostile_text_is_escaped_everywhere(tmp_path):
    folder = write(tmp_path / "run", name="</title><script>1</script>", description=HOSTILE[1], hostile=HOSTILE)
    text = write_report(folder).path.read_text()
    assert "<img" not in text
    assert "&lt;img src=x" in text
    assert "&lt;/title&gt;&lt;script&gt;" in text
    assert len(re.findall(r"<script(?! type=\"(?:application/json|text/plain)\")", text)) == 1
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_block_has_the_numbers_of_the_file(tmp_path):
    stage = read_run(write(tmp_path / "run")).stages["distil"]
    content = stage_content(read_run(tmp_path / "run"), stage)
    head, columns = opened(content.blocks["s10"])
    numbers = slices(head["rows"], columns)
    rows = stage.samples(10)
    assert rows is not None
    by_id = {rows.value("prompt_id", i): i for i in range(len(rows))}
    assert [row["id"] for row in head["rows"]] == list(range(1000, 1008))
    for row, own in zip(head["rows"], numbers, strict=True):
        i = by_id[row["id"]]
        for name, column in (
            ("p", "policy_logp"),
            ("q", "teacher_logp"),
            ("signal", "signal"),
            ("hp", "student_entropy"),
        ):
            assert np.abs(own[name] - rows.numbers(column, i)).max() <= 0.0051
        assert [head["vocabulary"][k][1] for k in own["token"]] == rows.value("response_tokens", i)
        tops = [head["vocabulary"][k][0] for k in own["teacher_top"]]
        assert tops == [k for one in rows.value("teacher_top_ids", i) for k in one]
        assert head["texts"][row["prompt"]] == rows.value("prompt", i)


def test_follow_block_has_the_same_prompts_at_every_step(tmp_path):
    run = read_run(write(tmp_path / "run"))
    head, _ = opened(stage_content(run, run.stages["distil"]).blocks["follow"])
    assert [[step for step, _ in group["at"]] for group in head["groups"]] == [[5, 10, 15, 20]] * 2
    for group in head["groups"]:
        assert {head["rows"][i]["id"] for _, i in group["at"]} == {group["id"]}


def test_long_responses_fit_the_budget(tmp_path):
    run = read_run(write(tmp_path / "run", steps=5, tokens=3000, rows=4, prompts=2))
    head, columns = opened(stage_content(run, run.stages["distil"], Options(tokens=4000)).blocks["s5"])
    own = slices(head["rows"], columns)
    for row, numbers in zip(head["rows"], own, strict=True):
        assert row["length"] == 3000
        assert sum(b - a for a, b in row["parts"]) == len(numbers["p"]) <= 400


def test_report_without_text_has_numbers_alone(tmp_path):
    folder = write(tmp_path / "run")
    found = write_report(folder, options=Options(text=False))
    text = found.path.read_text()
    assert found.responses == 0
    assert "b-0-curves" in text
    assert "b-0-held" not in text
    assert "What is" not in text
    assert "as resolved" not in text


def test_report_of_old_run_says_what_is_off(tmp_path):
    text = write_report(write(tmp_path / "run", old=True)).path.read_text()
    assert "written by an earlier version of opd. Off: the signal per token, the most likely tokens" in text


def test_report_of_unfinished_run_says_its_step(tmp_path):
    text = write_report(write(tmp_path / "run", planned=200)).path.read_text()
    assert "stopped at step 20 of 200" in text
    assert ">step 20</th>" in text


def test_report_has_stages_and_refuses_unknown_one(tmp_path):
    folder = write(tmp_path / "run", stages=("warm", "distil"))
    text = write_report(folder).path.read_text()
    assert re.findall(r'id="stage-tab-(\d)"', text) == ["0", "1"]
    assert 'role="tablist" aria-label="Stages"' not in write_report(folder, stage="warm").path.read_text()
    with pytest.raises(ConfigError, match=r"no stage 'warn'; it has warm, distil\. Did you mean 'warm'"):
        write_report(folder, stage="warn")


def test_report_of_run_without_steps_is_refused(tmp_path):
    folder = write(tmp_path / "run")
    (folder / "distil").rename(folder / "else")
    with pytest.raises(ConfigError, match="holds no step of any stage yet"):
        write_report(folder)


def test_opd_report_says_what_the_file_holds(tmp_path):
    folder = write(tmp_path / "run")
    shown = command("report", str(folder))
    assert shown.code == 0, shown.err
    responses = 3 * 24 + 4 * 8 + 4 * 2  # held out in three evaluations, four files of samples, and the followed rows
    assert re.fullmatch(rf"\S+report.html: 0\.\d\d MB, holds {responses} responses and their prompts\n", shown.out)
    refused = command("report", str(folder), "-o", str(folder))
    assert refused.code == 2
    assert "is a folder. Give another file with -o." in refused.err


def test_live_content_has_all_steps_and_blocks_by_name(tmp_path):
    run = read_run(write(tmp_path / "run", planned=40))
    stage = run.stages["distil"]
    content = live_content(run, stage)
    assert content.data["steps"] == [{"step": step, "shown": 8, "of": 8} for step in (5, 10, 15, 20)]
    assert content.data["held_when"] == ["before", "teacher", "step_000020"]
    for name in ("curves", "held", "follow", "s5"):
        block = block_of(stage, name)
        assert block is not None
        assert opened(block)[0]
    assert block_of(stage, "s6") is None
    assert block_of(stage, "../recipe.yaml") is None


def test_fake_run_without_samples_has_a_page(tmp_path):
    folder = write(tmp_path / "run", FakeRun(every=1000))
    assert "b-0-held" in write_report(folder).path.read_text()


@pytest.mark.parametrize(
    ("methods", "running", "expected"),
    [
        ({}, None, "three"),
        ({"three": "sft"}, None, "two"),
        ({"one": "sft", "two": "sft", "three": "sft"}, None, "three"),
        ({"three": "sft"}, "three", "three"),  # what runs is what a reader looks for
        ({}, "one", "one"),
    ],
)
def test_page_opens_on_the_stage_of_interest(tmp_path, methods, running, expected):
    names = ("one", "two", "three")
    folder = write(tmp_path / "run", stages=names, methods=methods, steps=2, every=2, prompts=2)
    if running is not None:
        (folder / running / "done.json").unlink()
        (folder / running / "progress.json").write_text(json.dumps({"phase": "train", "updated": time.time()}))
        (folder / HOLDER).touch()
    stages = list(read_run(folder).stages.values())
    assert stages[opened_first(stages)].name == expected


def test_peer_of_a_finished_stage_has_finished(tmp_path):
    """progress.json and done.json are in the stage's folder alone: a peer was `stopped at step 20 of 20`."""
    folder = write(tmp_path / "run", extra={"peers": ["other"]})
    shutil.copytree(folder / "distil", folder / "distil" / "peers" / "other")
    for name in ("progress.json", "done.json"):
        (folder / "distil" / "peers" / "other" / name).unlink()
    run = read_run(folder)
    assert [head_of(run, stage)["state_says"] for stage in run.stages.values()] == ["finished after 20 steps"] * 2
    (folder / "distil" / "done.json").unlink()
    (folder / "distil" / "progress.json").write_text(json.dumps({"phase": "train", "updated": time.time()}))
    (folder / HOLDER).touch()
    run = read_run(folder)
    assert [head_of(run, stage)["state"] for stage in run.stages.values()] == ["running"] * 2
