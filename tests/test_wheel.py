"""What is taken away: the files of wheel and sdist, the page of the index, and a run from the wheel alone."""

from __future__ import annotations

import email
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from support.runs import ENVIRONMENT

import opd
from opd.recipe.packaged import names

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://code.example/opd/blob/v0"
STAGES = ("teacher", "warm-up", "distil")  # of the recipe reverse_kl
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, out: Path) -> Path:
    """The file that setuptools builds, as `python -m build` calls it."""
    environment = {**os.environ, "OPD_REPOSITORY": REPOSITORY}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of the files that git would take, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "src", source / "src", symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    shutil.copytree(ROOT / "recipes", source / "recipes", symlinks=True)
    (source / "tests").mkdir()
    shutil.copy(__file__, source / "tests")
    sdist = build("build_sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return {"sdist": sdist, "wheel": build("build_wheel", unpacked, folder), "unpacked": unpacked}


def files_of(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_file_of_the_package(built: dict[str, Path]):
    """Recipes, schema, data, the assets of the viewer, and `py.typed`, as files: a link would be lost."""
    source = ROOT / "src"
    there = {file for name in ("opd", "opd_studies") for file in (source / name).rglob("*") if file.is_file()}
    wanted = {str(file.relative_to(source)) for file in there if "__pycache__" not in file.parts}
    wanted |= {f"opd/recipes/{name}.yaml" for name in names()} | {"opd/recipes/recipe.schema.json"}
    assert {"opd/assets/brief_questions_train.jsonl", "opd/assets/recipe.schema.json", "opd/py.typed"} <= wanted
    found = {file for file in files_of(built["wheel"]) if ".dist-info/" not in file}
    assert found == wanted
    assert all(stat.S_ISREG(info.external_attr >> 16) for info in zipfile.ZipFile(built["wheel"]).infolist())


def test_wheel_and_sdist_hold_no_tests(built: dict[str, Path]):
    assert not [file for file in files_of(built["wheel"]) if "test" in Path(file).parts[0]]
    unpacked = built["unpacked"]
    assert not (unpacked / "tests").exists() or not any((unpacked / "tests").iterdir())
    assert (unpacked / "CITATION.cff").exists()


def metadata(wheel: Path) -> email.message.Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = [file for file in archive.namelist() if file.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(archive.read(name))


def test_wheel_metadata_states_version_licence_and_pythons(built: dict[str, Path]):
    stated = metadata(built["wheel"])
    assert stated["Version"] == opd.__version__ == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert stated["License-Expression"] == "Apache-2.0"
    assert stated["Requires-Python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in stated.get_all("Classifier", [])


def test_wheel_readme_links_are_absolute_and_lead_to_files(built: dict[str, Path]):
    text = metadata(built["wheel"]).get_payload(decode=True).decode()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20
    assert all(link.startswith(("https://", "#")) for link in links)
    ours = [link.removeprefix(f"{REPOSITORY}/").partition("#")[0] for link in links if link.startswith(REPOSITORY)]
    assert not [path for path in ours if not (ROOT / path.removesuffix("?raw=true")).exists()]


def test_long_description_has_no_link_without_a_repository(tmp_path: Path):
    """`setup.py` runs `setup` when it is imported, so its function is taken from its text."""
    text = (ROOT / "setup.py").read_text().partition("setup(\n")[0].replace("from setuptools import setup", "")
    space: dict[str, object] = {}
    exec(text, space)
    described = space["long_description"]
    assert callable(described)
    page = "[one](docs/one.md) ![curve](docs/a.svg) [two](https://x.example) [`three`](#three)"
    assert described(page, "") == "one  [two](https://x.example) [`three`](#three)"
    assert described(page, "https://c/b/").split(" ")[:2] == [
        "[one](https://c/b/docs/one.md)",
        "![curve](https://c/b/docs/a.svg?raw=true)",
    ]


def test_wheel_trains_a_recipe_outside_the_repository(built: dict[str, Path], tmp_path: Path):
    """Unpacked as an installer does: no file of the repository is read."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(built["wheel"]).extractall(site)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    where = "import opd, sys; print(opd.__file__)"
    done = subprocess.run([sys.executable, "-c", where], env=environment, cwd=work, capture_output=True, text=True)
    assert Path(done.stdout.strip()).is_relative_to(site)
    small = [f"stages.{stage}.{key}" for stage in STAGES for key in ("steps=1", "data.options.count=64")]
    small.append("defaults.evaluate.data.options.count=8")
    done = subprocess.run(
        [sys.executable, "-m", "opd", "train", "reverse_kl", *small],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "distil (reverse_kl), held-out prompts" in done.stdout
    assert 'AutoModelForCausalLM.from_pretrained("runs/reverse_kl/distil/model")' in done.stdout
