"""Teachers on servers (`models.NAME.server`) and engines (`stages.NAME.engine`): checks that send nothing, and both."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from opd.engines.address import check_address, check_key, check_private
from opd.engines.scoring import WIDER, by_position, refusal, top_of
from opd.errors import ConfigError
from opd.method import Method
from opd.models.preview import tokenizer_of
from opd.parallel import ALONE, World
from opd.recipe.schema import EngineSection, ModelSpec, Recipe, ServerSection, StageSpec
from opd.runs.launched import check_start
from opd.runs.saves import trains_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from opd.engines.capabilities import Capabilities
    from opd.engines.replicas import Replicas
    from opd.models.language_model import LanguageModel
    from opd.samplers.vllm import EngineSampler
    from opd.teachers.served import ServedTeacher
    from opd.types import Record, Rollout, ScoreRequest


def check_served(spec: StageSpec, name: str, section: ModelSpec, method: Method) -> list[str]:
    """Refuse addresses, keys and methods that cannot work. Sends nothing. Returns a line. Raises ConfigError."""
    assert section.server is not None
    where = f"models.{name}.server"
    by = check_servers(section.server, name, where)
    role = "teacher" if name in spec.teachers else "base"
    requests = requests_of(method)
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


def check_engine(recipe: Recipe, spec: StageSpec, given: Mapping[str, LanguageModel], processes: int = 1) -> list[str]:
    """Refuse an engine that the stage cannot use. Sends nothing. Returns a line. Raises ConfigError."""
    section, where = spec.engine, f"{spec.where(None)}: `engine`"
    if section is None:
        return []
    by = check_servers(section, spec.train, where)
    if spec.sampler is not None:
        raise ConfigError(f"{where} and `sampler` both write the student's responses. Remove one of them.")
    if section.sleep and (spec.ahead or processes > 1):
        raise ConfigError(
            f"{where}: with `sleep` the servers give up their weights while the trainer trains, and "
            + ("`ahead: 1` draws meanwhile" if spec.ahead else "another process may still draw")
            + ". Remove `sleep`."
        )
    if spec.peers:
        raise ConfigError(f"{where}: an engine holds the weights of one model, and `peers` train several. Remove one.")
    if section.weights == "lora" and not trains_adapter(recipe, spec, given):
        raise ConfigError(
            f"{where}: `weights: lora` sends an adapter, and the model {spec.train!r} trains its full weights. Give "
            f"models.{spec.train} a `lora` section, or set `weights: full`."
        )
    if section.weights == "transfer":
        check_transfer(section, where)
    return [f"responses are sampled by {by}"]


def check_transfer(section: EngineSection, where: str) -> None:
    """Refuse weights by NCCL that this environment cannot send, and settings that exclude it. Raises ConfigError."""
    from opd.engines.nccl import lacking

    if (why := lacking()) is not None:
        raise ConfigError(
            f"{where}: `weights: transfer` sends the weights by NCCL from a GPU of this process, and {why}. Set "
            "`weights: full`, which sends them by a folder."
        )
    if section.folder is not None:
        raise ConfigError(f"{where}: with `weights: transfer` nothing goes through a folder. Remove `folder`.")
    if section.start is not None or section.sleep:
        raise ConfigError(
            f"{where}: `weights: transfer` needs servers that you start (`urls`) on other GPUs, which do not sleep. "
            "Remove `start` and `sleep`, or set `weights: full`."
        )


def replicas_of(section: ServerSection | EngineSection, world: World = ALONE) -> Replicas:
    """The servers of a section that `check_addresses` accepts, as a process of `world` uses them.

    The processes share the tokens in flight, and each begins with another server.
    """
    from opd.engines.address import key_in
    from opd.engines.replicas import Replicas
    from opd.engines.server import Server

    key = key_in(section.api_key_env)
    roots = [url.rstrip("/").removesuffix("/v1") for url in section.urls]
    first = world.rank % len(roots)
    return Replicas(
        servers=tuple(Server(url=url, key=key, timeout_s=section.timeout_s) for url in roots[first:] + roots[:first]),
        tokens_in_flight=max(1, section.tokens_in_flight // world.size),
        retries=section.retries,
        patience_s=section.patience_s,
    )


def engine_samplers(
    spec: StageSpec,
    section: EngineSection,
    student: LanguageModel,
    folder: Path,
    root: nn.Module | None = None,
    world: World = ALONE,
    load: Callable[[], LanguageModel] | None = None,
) -> dict[str | None, EngineSampler]:
    """The samplers of a stage with an engine, by task. The first of them sends the weights.

    Every process of `world` calls this. `root`: of a sharded student. `load` loads it as it was before the stage, whole
    and on the CPU. Raises ConfigError for servers that do not answer or have other tokens.
    """
    from opd.engines.adapters import AdapterSync
    from opd.engines.capabilities import probe
    from opd.engines.sync import Sync
    from opd.engines.transfer import end_open_update
    from opd.files import expanded
    from opd.runs.prepare import sampling_of
    from opd.runs.weights import sync_of
    from opd.samplers.vllm import EngineSampler

    if not section.public:
        for url in section.urls:
            check_private(url, f"{spec.where(None)}: `engine`")
    replicas = replicas_of(section, world)
    if section.weights == "transfer":
        world.by_main(lambda: end_open_update(replicas))
    if section.sleep:  # a killed run has left them asleep, and then they answer nothing
        world.by_main(lambda: replicas.each(lambda one: one.post("wake_up", {}, lambda raw: True)))
    able = world.by_main(
        lambda: probe(replicas, section.model, student.tokenizer, by_position=0, top=lambda _: 0, one_model=False)
    )
    sync = sync_of(
        section,
        student,
        replicas=replicas,
        model=able.model,
        folder=folder / "engine" if section.folder is None else expanded(section.folder),
        root=root or student.model,
        world=world,
        load=load or (lambda: student),
        where=f"{spec.where(None)}: `engine`",
    )
    return {
        task: EngineSampler(
            lm=student,
            sampling=sampling_of(part.sampling),
            replicas=replicas,
            model=able.model,
            update=None if i else sync,
            complete=completing(spec, student),
            adapters=sync if isinstance(sync, AdapterSync) else None,
            sleeper=sync if section.sleep and isinstance(sync, Sync) else None,
            max_prompt_length=spec.max_prompt_length,
        )
        for i, (task, part) in enumerate(spec.by_task.items())
    }


def completing(spec: StageSpec, student: LanguageModel) -> Callable[[Sequence[Rollout], Record], list[Rollout]]:
    """Adds the student's own values to responses of an engine: `policy_logp`, and what a record names."""
    from opd.runs.prepare import sampling_of
    from opd.teachers.local import with_record

    temperature = {task: sampling_of(part.sampling).temperature or 1.0 for task, part in spec.by_task.items()}

    def complete(rollouts: Sequence[Rollout], record: Record) -> list[Rollout]:
        return with_record(
            student,
            rollouts,
            record,
            temperature=lambda rollout: temperature[None if None in temperature else rollout.prompt.task],
            micro_batch_tokens=spec.micro_batch_tokens,
            policy=True,
        )

    return complete


def with_template(section: ModelSpec, students: Any) -> Any:
    """The tokenizer that renders what a served teacher reads: the student's, with the section's chat template."""
    if students is None or section.chat_template is None:
        return students
    own = copy.copy(students)
    own.chat_template = section.chat_template
    return own


def served_teacher(
    name: str, section: ModelSpec, student: LanguageModel, method: Method, world: World = ALONE
) -> ServedTeacher:
    """The teacher of a stage, once its servers have answered. Raises ConfigError and AlignmentError."""
    requests = requests_of(method)
    return teacher_on_servers(name, section, (student.name, student.tokenizer), requests, student.device, world)


def teacher_on_servers(
    name: str,
    section: ModelSpec,
    student: tuple[str, Any],
    requests: Sequence[ScoreRequest],
    device: torch.device,
    world: World = ALONE,
) -> ServedTeacher:
    """A teacher that answers `requests`, once its servers have answered. Raises ConfigError and AlignmentError.

    `student`: the name and the tokenizer of the model whose ids are scored. The scores are put on `device`.
    """
    from opd.models.vocabularies import check_same_tokens
    from opd.teachers.served import ServedTeacher

    server = section.server
    assert server is not None
    students, tokenizer = student
    own = tokenizer_of(section, name)
    if own is not None:
        check_same_tokens(tokenizer, own, (students, name))
    replicas, capabilities = reached(server, tokenizer, requests, world)
    return ServedTeacher(
        name=name,
        replicas=replicas,
        capabilities=capabilities,
        tokenizer=with_template(section, tokenizer) if own is None else own,
        template_options=dict(section.template_options),
        device=device,
        max_failed=server.max_failed,
    )


def reached(
    server: ServerSection, tokenizer: Any, requests: Sequence[ScoreRequest], world: World = ALONE
) -> tuple[Replicas, Capabilities]:
    """The servers of a teacher that answers `requests`, and what they can do, once all have answered.

    `tokenizer` is the student's. Every process of `world` calls this, and one contacts the servers. Raises ConfigError.
    """
    from opd.engines.capabilities import probe

    replicas, size = replicas_of(server, world), len(tokenizer)

    def top(can: bool) -> int:
        return max(top_of(one, can and by_position(one) > 0, size) or 0 for one in requests)

    most = max(map(by_position, requests))
    return replicas, world.by_main(
        lambda: probe(replicas, server.model, tokenizer, top=top, by_position=most),
    )


def able_lines(name: str, replicas: Replicas, able: Capabilities, k: int) -> list[str]:
    """What a teacher's servers can do, and what takes the place of what they cannot. `k`: of the student's top k."""
    lines = [f"{name}: {len(replicas.servers)} of {able.model}", *able.notes]
    if k and not able.positions:
        lines.append(
            f"{name}: its servers do not score given tokens by position (vLLM since 0.31, with --enable-scale-out). "
            f"The teacher's top {WIDER * k} are read instead; tokens of the student's top {k} outside of them are left "
            "out of the support, and counted as teacher_ids_missing"
        )
    return lines


def requests_of(method: Method) -> list[ScoreRequest]:
    """What a stage's teacher is asked for: by the method, and by its parts."""
    return [one.request(shown=True) for one in (method, *(part.method for part in method.parts.values()))]
