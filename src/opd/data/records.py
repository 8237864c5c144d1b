"""Responses and their scores as rows of a Parquet file, for other programs to read and to write: docs/records.md.

A value of a rollout that a file lacks has a default, so a file of two columns, `prompt_ids` and `response_ids`, can be
scored. Columns of other names stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd.data.arrow import column_values, described, holds_messages, lists, shape_of
from opd.data.files import missing, parquet_file
from opd.errors import ConfigError, DataError, nearest
from opd.files import encodings, expanded, unfit, write_atomically
from opd.plugins import torch
from opd.types import Prompt, Rollout, ScoreRequest, Scores

FORMAT = 1
KEY = b"opd"  # of the file's metadata: JSON
ROWS = 256  # read, scored and written together

IDS, LOGP, MASK = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.bool_())
REQUIRED = ("prompt_ids", "response_ids")
RESPONSE: dict[str, Any] = {
    "prompt_id": pa.int64(),
    "sample": pa.int32(),
    "prompt": pa.string(),
    "prompt_is_json": pa.bool_(),
    "prompt_ids": IDS,
    "response_ids": IDS,
    "text": pa.string(),
    "finished": pa.bool_(),
    "trained": MASK,
    "sampler_logp": LOGP,
    "policy_logp": LOGP,
    "student_top_ids": pa.list_(IDS),
    "sampler_version": pa.int64(),
}
SCORE: dict[str, Any] = {
    "teacher_logp": LOGP,
    "scored": MASK,
    "support_ids": pa.list_(IDS),
    "support_mask": pa.list_(MASK),
    "teacher_support_logp": pa.list_(LOGP),
    "teacher_top_ids": pa.list_(IDS),
    "teacher_top_logp": pa.list_(LOGP),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """A file that can be read. `info` is what its metadata says about models, sampling and scores."""

    path: Path
    schema: Any  # pyarrow's
    rows: int
    info: Mapping[str, Any]

    def batches(self) -> Iterator[tuple[int, Any]]:
        """(the number of its first row, a pyarrow RecordBatch) of at most ROWS rows, in order."""
        first = 0
        try:
            for batch in parquet_file(self.path).iter_batches(batch_size=ROWS):
                yield first, batch
                first += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            why = str(error).partition("\n")[0]
            raise DataError(f"{self.path} is damaged after row {first}: {why}. Write it again.") from error

    def rollouts(self, first: int, batch: Any) -> list[Rollout]:
        """The responses of a batch that begins with row `first`. Raises DataError, which names the row."""
        rows = self._rows(first, batch, RESPONSE)
        return [_rollout(row, first + i, where) for i, (where, row) in enumerate(rows)]

    def scores(self, first: int, batch: Any) -> list[Scores | None]:
        """The scores of a batch that begins with row `first`; None for a row without. Raises DataError."""
        rows = self._rows(first, batch, {"response_ids": IDS, **SCORE})
        return [_scores(row, where) for where, row in rows]

    def _rows(self, first: int, batch: Any, kinds: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """(the place of a row, its values in the columns that the file has) for each row of a batch."""
        places = [f"Row {first + i} of {self.path}" for i in range(batch.num_rows)]
        given = {name: column_values(batch, name, kinds[name], places) for name in kinds if name in batch.schema.names}
        return [(where, {name: values[i] for name, values in given.items()}) for i, where in enumerate(places)]


def read_records(file: str | Path) -> Iterator[tuple[Rollout, Scores | None]]:
    """The rows of a file in order: each response, and its scores if the file has them.

    A file without a column gives `prompt_id` the number of the row, `trained` True at every token, `finished` True, and
    None, 0 or an empty text to the others. Raises DataError for an unusable file or row, with the number of the row.
    """
    records = open_records(expanded(file))
    for first, batch in records.batches():
        yield from zip(records.rollouts(first, batch), records.scores(first, batch), strict=True)


def open_records(path: Path) -> Records:
    """Raises DataError for a missing or unreadable file, and for columns that are missing or of another type."""
    if not path.is_file():
        raise missing(path)
    file = parquet_file(path)
    schema = file.schema_arrow
    for name in REQUIRED:
        if name not in schema.names:
            raise DataError(
                f"{path} has no column `{name}`.{nearest(name, schema.names)} Its columns: {', '.join(schema.names)}. "
                "A row needs `prompt_ids` and `response_ids`, lists of token ids. Add the column, or rename it."
            )
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{path} has more than one column `{'`, `'.join(twice)}`. Rename all but one.")
    for name, kind in {**RESPONSE, **SCORE}.items():
        found = schema.field(name).type if name in schema.names else kind
        if shape_of(found) != shape_of(kind) and not (name == "prompt" and holds_messages(found)):
            raise DataError(
                f"The column `{name}` of {path} has the type {found}, but it must hold {described(kind)}. Write it "
                f"with that type ({kind}), or rename it."
            )
    if not file.metadata.num_rows:
        raise DataError(f"{path} has no rows. Give a file with at least one response.")
    info = _info((schema.metadata or {}).get(KEY), path)
    return Records(path=path, schema=schema, rows=file.metadata.num_rows, info=info)


def target_of(path: str, flag: str) -> Path:
    """The file to write. Raises ConfigError if it cannot be written, or is named like a file of another format."""
    file = expanded(path)
    if why := unfit(file):
        raise ConfigError(f"{flag} {path} {why}. Give the path of a file in an existing folder.")
    if file.suffix.lower() != ".parquet":
        raise ConfigError(f"{flag} {path} does not end with .parquet, and records are Parquet files. Name it so.")
    return file


def response_schema(info: Mapping[str, Any]) -> Any:
    """The schema of a file of responses whose metadata says `info`."""
    return pa.schema(RESPONSE, metadata={KEY: _json(info)})


def response_batch(rollouts: Sequence[Rollout], schema: Any) -> Any:
    """Responses as a RecordBatch."""
    columns: dict[str, Any] = {
        "prompt_id": [one.prompt.id for one in rollouts],
        "sample": [one.sample for one in rollouts],
        "prompt": [_text(one.prompt) for one in rollouts],
        "prompt_is_json": [not isinstance(one.prompt.content, str) for one in rollouts],
        "prompt_ids": [list(one.prompt_ids) for one in rollouts],
        "text": [one.text for one in rollouts],
        "finished": [one.finished for one in rollouts],
        "sampler_version": [one.sampler_version for one in rollouts],
    }
    tensors = [name for name in RESPONSE if name not in columns]
    columns |= {name: lists([getattr(one, name) for one in rollouts], RESPONSE[name]) for name in tensors}
    return pa.record_batch({name: columns[name] for name in schema.names}, schema=schema)


def scored_schema(schema: Any, request: ScoreRequest, info: Mapping[str, Any]) -> Any:
    """A file's schema with the columns of the scores that answer `request`, in place of earlier scores."""
    top = ("teacher_top_ids", "teacher_top_logp") if request.top_k else ()
    support = ("support_ids", "support_mask", "teacher_support_logp") if request.support.kind == "top_k" else ()
    kept = [column for column in schema if column.name not in SCORE]
    added = [pa.field(name, SCORE[name]) for name in ("teacher_logp", "scored", *support, *top)]
    return pa.schema([*kept, *added], metadata={**(schema.metadata or {}), KEY: _json(info)})


def scored_batch(batch: Any, scores: Sequence[Scores], schema: Any) -> Any:
    """The batch with scores, one per row, in the columns of `scored_schema`."""
    columns: list[Any] = []
    for name in schema.names:
        if name not in SCORE:
            columns.append(batch.column(name))
        elif name == "scored":
            known = [
                torch.ones_like(s.teacher_logp, dtype=torch.bool) if s.scored is None else s.scored for s in scores
            ]
            columns.append(lists(known, MASK))
        else:
            columns.append(lists([getattr(score, name) for score in scores], SCORE[name]))
    return pa.record_batch(columns, schema=schema)


def write_records(file: Path, schema: Any, batches: Iterator[Any]) -> None:
    """Write the batches as they come; the whole file, or the old one stays. Raises RunError if it cannot be written."""

    def write(part: Path) -> None:
        with pq.ParquetWriter(part, schema, **encodings(schema)) as writer:
            for batch in batches:
                writer.write_batch(batch)

    write_atomically(file, write)


@dataclass(slots=True, kw_only=True)
class Survey:
    """The extremes of all rows, each with its row, which say whether a teacher can score them."""

    path: Path
    largest: dict[str, tuple[int, int]]  # column of ids -> (largest id, row)
    longest: tuple[int, int]  # (tokens of prompt and response, row)
    student_top: tuple[int, int]  # (the least number of ids at a position of `student_top_ids`, row); 0: there are none

    def check_fits(self, *, prompt_ids: int, response_ids: int, positions: float) -> None:
        """Raise DataError for a row that the teacher cannot read.

        It reads prompts of ids below `prompt_ids`, scores ids below `response_ids`, and has `positions` for tokens.
        """
        limits = {"prompt_ids": prompt_ids, "response_ids": response_ids, "student_top_ids": response_ids}
        for name, (largest, row) in self.largest.items():
            if largest >= limits[name]:
                raise DataError(
                    f"Row {row} of {self.path}: `{name}` holds the id {largest}, but the teacher has only the ids 0 to "
                    f"{limits[name] - 1}. Score with a teacher that has the tokenizer of these ids."
                )
        tokens, row = self.longest
        if tokens > positions:
            raise DataError(
                f"Row {row} of {self.path}: prompt and response have {tokens} tokens, but the teacher reads at most "
                f"{positions:.0f}. Leave the row out, or use a teacher that reads more."
            )


def survey(records: Records) -> Survey:
    """Read all rows once. Raises DataError for a row that no teacher can score, with its number."""
    found = Survey(path=records.path, largest={}, longest=(0, 0), student_top=(2**31, 0))
    for first, batch in records.batches():
        for row, rollout in enumerate(records.rollouts(first, batch), start=first):
            top = rollout.student_top_ids
            largest = {"prompt_ids": max(rollout.prompt_ids), "response_ids": int(rollout.response_ids.max())}
            if top is not None and top.numel():
                largest["student_top_ids"] = int(top.max())
            for name, value in largest.items():
                found.largest[name] = max(found.largest.get(name, (-1, 0)), (value, row), key=lambda pair: pair[0])
            tokens = len(rollout.prompt_ids) + len(rollout.response_ids)
            found.longest = max(found.longest, (tokens, row), key=lambda pair: pair[0])
            number = 0 if top is None else top.shape[1]
            found.student_top = min(found.student_top, (number, row), key=lambda pair: pair[0])
    return found


def _rollout(row: Mapping[str, Any], number: int, where: str) -> Rollout:
    """The response of a row, whose absent values get their defaults. Raises DataError."""
    for name in REQUIRED:
        if row[name] is None or not len(row[name]):
            raise DataError(f"{where}: `{name}` is {'null' if row[name] is None else 'empty'}. Leave the row out.")
    for name in (*REQUIRED, "student_top_ids"):
        ids = row.get(name)
        if ids is not None and ids.numel() and int(ids.min()) < 0:
            raise DataError(
                f"{where}: `{name}` holds {int(ids.min())}, which is no token's id. Leave padding out, and say in "
                "`trained` which tokens train."
            )
    response = row["response_ids"]
    _check_lengths({name: row.get(name) for name in RESPONSE if name != "prompt_ids"}, len(response), where)
    given = {name: value for name, value in row.items() if value is not None}
    return Rollout(
        prompt=Prompt(id=given.get("prompt_id", number), content=_content(given, where)),
        sample=given.get("sample", 0),
        prompt_ids=tuple(row["prompt_ids"].tolist()),
        response_ids=response,
        trained=given.get("trained", torch.ones_like(response, dtype=torch.bool)),
        turn=torch.zeros_like(response),
        finished=given.get("finished", True),
        text=given.get("text", ""),
        sampler_logp=given.get("sampler_logp"),
        policy_logp=given.get("policy_logp"),
        student_top_ids=given.get("student_top_ids"),
        sampler_version=given.get("sampler_version", 0),
    )


def _scores(row: Mapping[str, Any], where: str) -> Scores | None:
    """The scores of a row; None without log-probs. Raises DataError."""
    if row.get("teacher_logp") is None:
        return None
    _check_lengths(row, len(row["response_ids"]), where)
    return Scores(**{name: value for name, value in row.items() if name in SCORE})


def _check_lengths(row: Mapping[str, Any], tokens: int, where: str) -> None:
    """Raise DataError for a value per token that has not one for each token of the response."""
    for name, value in row.items():
        if isinstance(value, torch.Tensor) and len(value) != tokens:
            raise DataError(
                f"{where}: `{name}` has {len(value)} entries, and `response_ids` has {tokens}. Give one for each token "
                "of the response."
            )


def _text(prompt: Prompt) -> str:
    content = prompt.content
    return content if isinstance(content, str) else json.dumps([dict(one) for one in content], ensure_ascii=False)


def _content(row: Mapping[str, Any], where: str) -> str | tuple[Mapping[str, Any], ...]:
    """The text or the messages of the column `prompt`. Raises DataError."""
    text = row.get("prompt", "")
    if isinstance(text, list):  # of structs, which Arrow gives the keys of all of them, with nulls
        return tuple({key: value for key, value in one.items() if value is not None} for one in text)
    if not row.get("prompt_is_json", False):
        return text
    try:
        messages = json.loads(text)
    except ValueError:
        messages = None
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise DataError(
            f"{where}: `prompt_is_json` is true, but `prompt` is not a list of messages in JSON, got {text!r:.80}. "
            "Write one, or set `prompt_is_json` to false."
        )
    return tuple(messages)


def _json(info: Mapping[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, **info}).encode()


def _info(text: bytes | None, path: Path) -> dict[str, Any]:
    """What the metadata says, with `models` and `tokens`, empty without.

    Raises DataError for a damaged text, and for a format of a later version.
    """
    try:
        info: dict[str, Any] = {"format": FORMAT} if text is None else dict(json.loads(text))
        number = int(info.pop("format"))
        models, tokens = (dict(info.get(name, {})) for name in ("models", "tokens"))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"The metadata `opd` of {path} is damaged ({error!r}). Remove it, or write it again."
        ) from error
    if number > FORMAT:
        raise DataError(
            f"{path} has format {number} of records, and this version of opd reads formats up to {FORMAT}. Install a "
            "newer version, or remove the metadata `opd`."
        )
    return {**info, "models": models, "tokens": tokens}
