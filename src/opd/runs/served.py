"""Teachers on servers (`models.NAME.server`) and engines (`stages.NAME.engine`): checks that send nothing, and both."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from opd.engines.address import check_address, check_key, check_private
from opd.errors import ConfigError
from opd.method import Method
from opd.models.preview import tokenizer_of
from opd.recipe.schema import EngineSection, ModelSpec, ServerSection, StageSpec
from opd.runs.launched import check_start

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from opd.engines.replicas import Replicas
    from opd.models.language_model import LanguageModel
    from opd.samplers.vllm import EngineSampler
    from opd.teachers.served import ServedTeacher
    from opd.types import Record, Rollout, ScoreRequest


def check_served(spec: StageSpec, name: str, section: ModelSpec, method: Method) -> list[str]:
    """Refuse addresses, keys and methods that cannot work. Sends nothing. Returns a line. Raises ConfigError."""
    from opd.teachers.served import refusal

    assert section.server is not None
    where = f"models.{name}.server"
    by = check_servers(section.server, name, where)
    role = "teacher" if name in spec.teachers else "base"
    requests = [one.request(shown=True) for one in (method, *(part.method for part in method.parts.values()))]
    if role == "teacher" and method.teacher.tokenizer != "students":
        raise ConfigError(
            f"{spec.where(None)}: method {spec.method!r} compares two tokenizers, and {where} scores the student's own "
            "tokens. Use a method for the student's tokenizer, or a teacher with `path`."
        )
    for request in requests:
        if role == "teacher" and (why := refusal(request)):
            raise ConfigError(f"{spec.where(None)}: {where} cannot score method {spec.method!r}: {why}.")
    if spec.diagnostics.every:
        raise ConfigError(
            f"{spec.where(None)}: diagnostics.every compares whole distributions, and {where} gives log-probs of "
            "single tokens. Set diagnostics.every to 0, or use a teacher with `path`."
        )
    for task, part in spec.by_task.items():
        if part.evaluate is not None and part.evaluate.kl:
            raise ConfigError(
                f"{spec.where(task)}: evaluate.kl compares whole distributions, and {where} gives log-probs of single "
                "tokens. Set evaluate.kl to false, or use a teacher with `path`."
            )
    return [f"{role} {name}: scored by {by}"]


def check_servers(section: ServerSection | EngineSection, name: str, where: str) -> str:
    """Refuse addresses, keys and starts that cannot work. Sends and starts nothing. Returns who works, for a line.

    Raises ConfigError or DataError.
    """
    if section.start is not None:
        return check_start(section.start, name, f"{where}.start")
    check_addresses(section, where)
    number = len(section.urls)
    return f"{number} server{'s' if number > 1 else ''}, reached when the stage begins"


def check_addresses(section: ServerSection | EngineSection, where: str) -> None:
    """Refuse addresses and keys that cannot work. Raises ConfigError."""
    for i, url in enumerate(section.urls):
        check_address(url, f"{where}: `urls`, number {i + 1},")
    if section.api_key_env is not None:
        check_key(section.api_key_env, where)


def check_engine(spec: StageSpec, processes: int) -> list[str]:
    """Refuse an engine that the stage cannot use. Sends nothing. Returns a line. Raises ConfigError."""
    section, where = spec.engine, f"{spec.where(None)}: `engine`"
    if section is None:
        return []
    by = check_servers(section, spec.train, where)
    if spec.sampler is not None:
        raise ConfigError(f"{where} and `sampler` both write the student's responses. Remove one of them.")
    if processes > 1:
        raise ConfigError(
            f"{where}: {processes} processes were started, and weights go to an engine from one process. Start one."
        )
    return [f"responses are sampled by {by}"]


def replicas_of(section: ServerSection | EngineSection) -> Replicas:
    """The servers of a section that `check_addresses` accepts."""
    from opd.engines.address import key_in
    from opd.engines.replicas import Replicas
    from opd.engines.server import Server

    key = key_in(section.api_key_env)
    roots = [url.rstrip("/").removesuffix("/v1") for url in section.urls]
    return Replicas(
        servers=tuple(Server(url=url, key=key, timeout_s=section.timeout_s) for url in roots),
        tokens_in_flight=section.tokens_in_flight,
        retries=section.retries,
        patience_s=section.patience_s,
    )


def engine_samplers(
    spec: StageSpec, section: EngineSection, student: LanguageModel, folder: Path
) -> dict[str | None, EngineSampler]:
    """The samplers of a stage with an engine, by task. The first of them sends the weights.

    Raises ConfigError for servers that do not answer or have other tokens.
    """
    from opd.engines.capabilities import probe
    from opd.engines.sync import Sync
    from opd.files import expanded
    from opd.models import saving
    from opd.runs.prepare import sampling_of
    from opd.samplers.vllm import EngineSampler
    from opd.teachers.local import log_probs, with_record

    if not section.public:
        for url in section.urls:
            check_private(url, f"{spec.where(None)}: `engine`")
    replicas = replicas_of(section)
    if section.sleep:  # a killed run has left them asleep, and then they answer nothing
        replicas.each(lambda one: one.post("wake_up", {}, lambda raw: True))
    able = probe(replicas, section.model, student.tokenizer, by_position=0, top=lambda _: 0, one_model=False)

    def complete(rollouts: Sequence[Rollout], record: Record) -> list[Rollout]:
        temperature = {task: sampling_of(part.sampling).temperature or 1.0 for task, part in spec.by_task.items()}
        return with_record(
            student,
            rollouts,
            record,
            temperature=lambda rollout: temperature[None if None in temperature else rollout.prompt.task],
            micro_batch_tokens=spec.micro_batch_tokens,
            policy=True,
        )

    def logp(ids: Sequence[int], temperature: float) -> np.ndarray:
        return log_probs(student, ids, temperature).numpy()

    sync = Sync(
        replicas=replicas,
        model=able.model,
        folder=folder / "engine" if section.folder is None else expanded(section.folder),
        write=lambda to: saving.save(student, to),
        logp=logp,
        vocabulary=len(student.tokenizer),
        tolerance=section.tolerance,
        sleeps=section.sleep,
    )
    return {
        task: EngineSampler(
            lm=student,
            sampling=sampling_of(part.sampling),
            replicas=replicas,
            model=able.model,
            update=None if i else sync,
            shared=sync,
            complete=complete,
            max_prompt_length=spec.max_prompt_length,
        )
        for i, (task, part) in enumerate(spec.by_task.items())
    }


def with_template(section: ModelSpec, students: Any) -> Any:
    """The tokenizer that renders what a served teacher reads: the student's, with the section's chat template."""
    if students is None or section.chat_template is None:
        return students
    own = copy.copy(students)
    own.chat_template = section.chat_template
    return own


def served_teacher(name: str, section: ModelSpec, student: LanguageModel, method: Method) -> ServedTeacher:
    """The teacher of a stage, once its servers have answered. Raises ConfigError and AlignmentError."""
    requests = [one.request(shown=True) for one in (method, *(part.method for part in method.parts.values()))]
    return teacher_on_servers(name, section, (student.name, student.tokenizer), requests, student.device)


def teacher_on_servers(
    name: str, section: ModelSpec, student: tuple[str, Any], requests: Sequence[ScoreRequest], device: torch.device
) -> ServedTeacher:
    """A teacher that answers `requests`, once its servers have answered. Raises ConfigError and AlignmentError.

    `student`: the name and the tokenizer of the model whose ids are scored. The scores are put on `device`.
    """
    from opd.engines.capabilities import probe
    from opd.models.vocabularies import check_same_tokens
    from opd.teachers.served import ServedTeacher, top_of

    server = section.server
    assert server is not None
    students, tokenizer = student
    own = tokenizer_of(section, name)
    if own is not None:
        check_same_tokens(tokenizer, own, (students, name))
    replicas = replicas_of(server)

    def top(by_position: bool) -> int:
        size = len(tokenizer)
        return max(top_of(one, by_position and bool(one.support.student_top_k), size) or 0 for one in requests)

    return ServedTeacher(
        name=name,
        replicas=replicas,
        capabilities=probe(
            replicas,
            server.model,
            tokenizer,
            top=top,
            by_position=max(k + 1 if (k := one.support.student_top_k) else 0 for one in requests),
        ),
        tokenizer=with_template(section, tokenizer) if own is None else own,
        template_options=dict(section.template_options),
        device=device,
        max_failed=server.max_failed,
    )


def served_lines(teacher: ServedTeacher, method: Method) -> list[str]:
    """What the servers can do, and what takes the place of what they cannot."""
    from opd.teachers.served import WIDER

    able = teacher.capabilities
    lines = [f"{teacher.name}: {len(teacher.replicas.servers)} of {able.model}", *able.notes]
    k = method.support.student_top_k
    if k and not able.positions:
        lines.append(
            f"{teacher.name}: its servers do not score given tokens by position (vLLM since 0.31, with "
            f"--enable-scale-out). The teacher's top {WIDER * k} are read instead; tokens of the student's top {k} "
            "outside of them are left out of the support, and counted as teacher_ids_missing"
        )
    return lines
