"""vLLM servers that a stage starts: `start` of a teacher's server or of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from opd.engines import launch
from opd.engines.launch import Launch
from opd.errors import ConfigError
from opd.models.paths import Source, source_of
from opd.recipe.schema import ModelSpec, Servers, StageSpec, StartSection

if TYPE_CHECKING:
    from opd.models.language_model import LanguageModel
    from opd.parallel import World
    from opd.stage.folder import StageDir
    from opd.stage.progress import Progress

Section = TypeVar("Section", bound=Servers)


def check_start(start: StartSection, name: str, where: str) -> str:
    """Refuse a Python without vLLM, and a path that vLLM cannot serve. Starts no server. Returns a line's words.

    Raises ConfigError or DataError.
    """
    python = launch.python_of(start.python, where, start.env)
    if start.path is not None:
        teachers_source(start, name)
    return f"a server that the stage starts with {python}"


def teachers_source(start: StartSection, name: str) -> Source:
    """The folder, hub id or GGUF file of a teacher to serve. Raises ConfigError or DataError."""
    where = f"models.{name}.server.start.path"
    source = source_of(ModelSpec(path=start.path), name, where)
    if source.adapters:
        raise ConfigError(
            f"{where}: {start.path} is an adapter, and the server gets whole models. Merge it into its base, e.g. with "
            "`save: merged` of the stage that trained it, or give the base's path and `--enable-lora` among `flags` of "
            "a server that you start yourself."
        )
    return source


@dataclass(frozen=True, slots=True, kw_only=True)
class Starter:
    """Starts the servers of one stage, which run until `servers` closes. Their logs are in the stage's folder."""

    folder: StageDir
    servers: ExitStack
    progress: Progress
    world: World

    def teacher(self, name: str, section: ModelSpec) -> ModelSpec:
        """The section of a teacher with the address of its server. Its tokenizer is that of its own path.

        Raises ConfigError, with the last lines of the log, if the server does not start.
        """
        from opd.models.loading import loadable

        server = section.server
        if server is None or server.start is None:
            return section
        with self.world.main_first():
            source = loadable(teachers_source(server.start, name))
        tokenizer = str(source.tokenizer)
        flags = ("--dtype", server.start.dtype, "--tokenizer", tokenizer, *launch.OF_TEACHER)
        found = self._started(server, name, str(source.weights), flags, {})
        return section.model_copy(update={"server": found, "tokenizer": section.tokenizer or tokenizer})

    def engine(self, spec: StageSpec, student: LanguageModel) -> StageSpec:
        """The stage with the address of its engine's server, which has the student's weights as they are now.

        Call it before the student is sharded. Raises ConfigError as `teacher`.
        """
        from opd.models import saving

        section = spec.engine
        if section is None or section.start is None:
            return spec
        weights = self.folder.path / "engine" / "start"
        if self.world.main:
            weights.mkdir(parents=True, exist_ok=True)
            saving.save(student, weights)
        dtype = str(next(student.model.parameters()).dtype).removeprefix("torch.")
        sleeps = launch.OF_SLEEPER if section.sleep and student.device.type != "cpu" else ()  # vLLM refuses it on a CPU
        flags = ("--dtype", dtype, *launch.OF_ENGINE, *sleeps)
        found = self._started(section, spec.train, str(weights.absolute()), flags, launch.CONTROL_ROUTES)
        return spec.model_copy(update={"engine": found})

    def _started(
        self, section: Section, name: str, model: str, flags: Sequence[str], env: Mapping[str, str]
    ) -> Section:
        """The section with `urls` in place of `start`. The main process starts the server; all processes use it."""
        start = section.start
        assert start is not None
        self.progress.phase(f"starting the server of {name}")
        one = Launch(
            name=name,
            python=launch.python_of(start.python, f"the server of {name}", start.env) if self.world.main else "",
            model=model,
            flags=(*flags, *start.flags),
            env={**env, **start.env},
            log=self.folder.path / f"vllm-{name}.log",
            patience_s=start.patience_s,
        )
        found = self.world.by_main(lambda: self.servers.enter_context(launch.running(one)))
        self.progress.note(f"the server of {name} started in {found.seconds:.1f} s; its log: {one.log}")
        return section.model_copy(update={"urls": [found.url], "start": None, "model": found.model})
