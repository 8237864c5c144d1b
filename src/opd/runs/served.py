"""A teacher on servers (`models.NAME.server`): what can be checked before they are reached, and the teacher itself."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from opd.engines.address import check_address, check_key
from opd.errors import ConfigError
from opd.method import Method
from opd.models.preview import tokenizer_of
from opd.recipe.schema import ModelSpec, StageSpec

if TYPE_CHECKING:
    from opd.models.language_model import LanguageModel
    from opd.teachers.served import ServedTeacher


def check_served(spec: StageSpec, name: str, section: ModelSpec, method: Method) -> list[str]:
    """Refuse addresses, keys and methods that cannot work. Sends nothing. Returns a line. Raises ConfigError."""
    from opd.teachers.served import refusal

    assert section.server is not None
    where = f"models.{name}.server"
    for i, url in enumerate(section.server.urls):
        check_address(url, f"{where}: `urls`, number {i + 1},")
    if section.server.api_key_env is not None:
        check_key(section.server.api_key_env, where)
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
        if part.evaluate is not None and (part.evaluate.kl or part.evaluate.teacher):
            raise ConfigError(
                f"{spec.where(task)}: evaluate.{'kl' if part.evaluate.kl else 'teacher'} needs a teacher in this "
                f"process, and {where} only scores tokens. Turn it off, or use a teacher with `path`."
            )
    number = len(section.server.urls)
    return [f"{role} {name}: scored by {number} server{'s' if number > 1 else ''}, reached when the stage begins"]


def with_template(section: ModelSpec, students: Any) -> Any:
    """The tokenizer that renders what a served teacher reads: the student's, with the section's chat template."""
    if students is None or section.chat_template is None:
        return students
    own = copy.copy(students)
    own.chat_template = section.chat_template
    return own


def served_teacher(name: str, section: ModelSpec, student: LanguageModel, method: Method) -> ServedTeacher:
    """The teacher, once its servers have answered. Raises ConfigError and AlignmentError."""
    from opd.engines.address import key_in
    from opd.engines.capabilities import probe
    from opd.engines.replicas import Replicas
    from opd.engines.server import Server
    from opd.models.vocabularies import check_same_tokens
    from opd.teachers.served import ServedTeacher, top_of

    server = section.server
    assert server is not None
    own = tokenizer_of(section, name)
    if own is not None:
        check_same_tokens(student.tokenizer, own, (student.name, name))
    key = key_in(server.api_key_env)
    roots = [url.rstrip("/").removesuffix("/v1") for url in server.urls]
    replicas = Replicas(
        servers=tuple(Server(url=url, key=key, timeout_s=server.timeout_s) for url in roots),
        tokens_in_flight=server.tokens_in_flight,
        retries=server.retries,
        patience_s=server.patience_s,
    )
    requests = [one.request(shown=True) for one in (method, *(part.method for part in method.parts.values()))]

    def top(by_position: bool) -> int:
        size = len(student.tokenizer)
        return max(top_of(one, by_position and bool(one.support.student_top_k), size) or 0 for one in requests)

    return ServedTeacher(
        name=name,
        replicas=replicas,
        capabilities=probe(
            replicas,
            server.model,
            student.tokenizer,
            top=top,
            by_position=max(k + 1 if (k := one.support.student_top_k) else 0 for one in requests),
        ),
        tokenizer=with_template(section, student.tokenizer) if own is None else own,
        template_options=dict(section.template_options),
        device=student.device,
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
