"""`opd score FILE`: a teacher's scores of the responses in a file of records, as further columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd import __version__
from opd.data.records import (
    Records,
    Survey,
    open_records,
    scored_batch,
    scored_schema,
    survey,
    target_of,
    write_records,
)
from opd.errors import ConfigError, DataError, nearest
from opd.files import expanded
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model, loadable
from opd.models.paths import resolved_path, source_of
from opd.models.tokenizer_files import load_tokenizer
from opd.models.vocabularies import check_same_tokens, digest_of
from opd.pieces.supports import sampled, top_k
from opd.recipe.load import parse_section
from opd.recipe.schema import ModelSpec
from opd.runs.served import check_addresses, teacher_on_servers
from opd.teachers.local import LocalTeacher
from opd.teachers.served import ServedTeacher
from opd.types import Rollout, ScoreRequest, Scores

WHERE = "opd score --teacher"
SUPPORTS = ("sampled", "teacher", "student")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A teacher and the ids that it reads and scores: those below `prompt_ids` and `response_ids`."""

    teacher: LocalTeacher | ServedTeacher
    prompt_ids: int
    response_ids: int
    positions: float
    notes: tuple[str, ...]


def score_file(
    file: str,
    *,
    teacher: str,
    support: str = "sampled",
    k: int | None = None,
    top: int = 0,
    tokenizer: str | None = None,
    served_model: str | None = None,
    api_key_env: str | None = None,
    out: str | None = None,
    micro_batch_tokens: int = 4096,
    say: Callable[[str], None],
) -> str:
    """Add the scores of a teacher to the file, or write both to `out`, and return a line about them.

    `teacher` is the path of a model, or addresses of vLLM servers with commas between them. The teacher reads the ids
    of each row as they are. `support`, `k` and `top` are the options of the command; docs/records.md has the columns.

    Raises the errors of `opd.errors`: all that can be known of the rows before a weight is loaded.
    """
    request = request_of(support, k, top)
    target = target_of(out or file, "opd score FILE" if out is None else "--out")
    records = open_records(expanded(file))
    rows = survey(records)
    if request.support.student_top_k:
        _check_student_top(rows, request.support.k)
    urls = [one.strip() for one in teacher.split(",")] if teacher.startswith(("http://", "https://")) else []
    if urls:
        section = {"urls": urls, "model": served_model, "api_key_env": api_key_env}
        scorer = _served(parse_section(ModelSpec, {"server": section}, WHERE), records, tokenizer, request)
    else:
        _refuse_options_of_servers(served_model, api_key_env)
        scorer = _local(teacher, records, tokenizer, micro_batch_tokens)
    for note in scorer.notes:
        say(note)
    rows.check_fits(prompt_ids=scorer.prompt_ids, response_ids=scorer.response_ids, positions=scorer.positions)
    if max(k or 0, top) > scorer.response_ids:
        raise ConfigError(f"--k and --top-k count tokens of the teacher, which has {scorer.response_ids}. Lower them.")
    info = {
        **records.info,
        "library": f"opd {__version__}",
        "models": {**records.info["models"], "teacher": teacher},
        "request": {"support": support, "k": k, "top_k": top, "temperature": request.temperature},
    }
    schema = scored_schema(records.schema, request, info)
    counts = _Counts()

    def batches() -> Iterator[Any]:
        for first, batch in records.batches():
            rollouts = records.rollouts(first, batch)
            scores = scorer.teacher.score_after([one.prompt_ids for one in rollouts], rollouts, request)
            counts.add(rollouts, scores)
            yield scored_batch(batch, scores, schema)
            if counts.responses < records.rows:
                say(f"{counts.responses:,} of {records.rows:,} responses")

    write_records(target, schema, batches())
    return f"{target}: {counts} by {teacher}"


def request_of(support: str, k: int | None, top: int) -> ScoreRequest:
    """The request of a support by name. Raises ConfigError."""
    if support not in SUPPORTS:
        raise ConfigError(
            f"opd score got --support {support}.{nearest(support, SUPPORTS)} Give one of {', '.join(SUPPORTS)}."
        )
    if top < 0:
        raise ConfigError(f"opd score got --top-k {top}. Give the number of the teacher's most likely tokens to write.")
    if support == "sampled" and k is not None:
        raise ConfigError(f"opd score got --k {k} with --support sampled, which is one token. Leave --k out.")
    if support != "sampled" and k is None:
        raise ConfigError(f"opd score got --support {support} without --k. Give the number of tokens at a position.")
    chosen = sampled() if k is None else top_k(k, by="teacher" if support == "teacher" else "student")
    return ScoreRequest(support=chosen, top_k=top)


def _check_student_top(rows: Survey, k: int) -> None:
    number, row = rows.student_top
    if number < k:
        has = f"has {number}" if number else "has none"
        raise DataError(
            f"Row {row} of {rows.path}: --support student --k {k} reads {k} ids at each position from the column "
            f"`student_top_ids`, and the row {has}. Write them with `opd rollouts --top-k {k}`, or use --support "
            "teacher."
        )


def _refuse_options_of_servers(served_model: str | None, api_key_env: str | None) -> None:
    for flag, value in (("--served-model", served_model), ("--api-key-env", api_key_env)):
        if value is not None:
            raise ConfigError(f"opd score got {flag} {value}, and --teacher is no address of a server. Leave it out.")


def _served(section: ModelSpec, records: Records, tokenizer: str | None, request: ScoreRequest) -> Scorer:
    """A teacher on servers, once they have answered. Raises ConfigError."""
    assert section.server is not None
    check_addresses(section.server, WHERE)
    path = tokenizer or records.info["models"].get("student")
    if path is None:
        raise ConfigError(
            f"opd score with a server compares the server's tokens with those of the ids, and {records.path} does not "
            "say which model wrote them. Give the tokenizer: --tokenizer FOLDER."
        )
    students = _tokenizer(path)
    teacher = teacher_on_servers("teacher", section, ("the student", students), [request], torch.device("cpu"))
    longest = teacher.capabilities.longest
    return Scorer(
        teacher=teacher,
        prompt_ids=len(students),
        response_ids=len(students),
        positions=float("inf") if longest is None else longest - 1,
        notes=teacher.capabilities.notes,
    )


def _local(path: str, records: Records, tokenizer: str | None, micro_batch_tokens: int) -> Scorer:
    """A teacher in this process. Raises ConfigError, and AlignmentError for one with other tokens than the ids'."""
    spec = ModelSpec(path=path)
    resolved_path(spec, "teacher", WHERE)
    lm = load_model(spec, name="teacher", where=WHERE)
    lm, notes = _on_tokens_of_ids(lm, records, tokenizer)
    return Scorer(
        teacher=LocalTeacher(lm=lm, micro_batch_tokens=micro_batch_tokens, student_device=torch.device("cpu")),
        prompt_ids=lm.rows,
        response_ids=lm.vocabulary,
        positions=lm.positions,
        notes=(*lm.notes, *notes),
    )


def _on_tokens_of_ids(lm: LanguageModel, records: Records, tokenizer: str | None) -> tuple[LanguageModel, list[str]]:
    """The teacher on the tokens that it has in common with the writer of the ids, as in training; with notes."""
    written = records.info["tokens"]
    limit = min(lm.vocabulary, written.get("vocabulary", lm.vocabulary))
    path = tokenizer or records.info["models"].get("student")
    if path is None:
        return lm, [f"{records.path} does not say which model wrote the ids: they are read as the teacher's"]
    if tokenizer is None and written.get("sha256") == digest_of(lm.tokenizer):
        return replace(lm, vocabulary=limit), []
    common = check_same_tokens(_tokenizer(path), lm.tokenizer, ("the student", "the teacher"))
    return replace(lm, vocabulary=min(limit, common.size)), common.differences(("the student", "the teacher"))


def _tokenizer(path: str) -> Any:
    """The tokenizer of a model's folder, hub id or GGUF file. Raises ConfigError."""
    where = "opd score --tokenizer (default: the model that wrote the file)"
    source = loadable(source_of(ModelSpec(path=path), "student", where))
    return load_tokenizer(source.tokenizer, trust_remote_code=False, where=where)


@dataclass(slots=True)
class _Counts:
    """What has been scored, for a line."""

    responses: int = 0
    missed: int = 0  # responses without scores
    tokens: int = 0  # trained and scored
    logp: float = 0.0  # nats, of these

    def add(self, rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> None:
        for rollout, score in zip(rollouts, scores, strict=True):
            known = rollout.trained if score.scored is None else rollout.trained & score.scored
            self.responses += 1
            self.missed += score.scored is not None and not bool(score.scored.any())
            self.tokens += int(known.sum())
            self.logp += float(score.teacher_logp[known].double().sum())

    def __str__(self) -> str:
        mean = f", {self.logp / self.tokens:.4f} nats per token on average" if self.tokens else ""
        missed = f"; {self.missed:,} responses have no scores" if self.missed else ""
        return f"{self.responses:,} responses, {self.tokens:,} trained tokens scored{mean}{missed}"
