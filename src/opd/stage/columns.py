"""The columns of `samples/step_*.parquet` and `held_out_*.parquet`: one schema, with a version in the file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FORMAT = 2
KEY = "opd"  # of the file's metadata: JSON


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its type in words of Arrow, what it holds, and the version of the format that has it first.

    Format 0 are the files of opd before the schema, which have no metadata.
    """

    name: str
    kind: str
    text: str
    since: int = 1


UNITS = "list<struct<student_start, student_end, teacher_start, teacher_end: int32>>"
IMAGES = "list<struct<image: string, width: int32, height: int32>>"
PICKS = ("least", "most", "longest", "shortest", "chance", "follow")

COLUMNS = (
    Column("when", "string", "held out: `before`, `teacher` or `step_000050`", 0),
    Column("sampling", "string", "held out: the sampling setting", 0),
    Column("task", "string", "the prompt's task; null in a stage without tasks", 0),
    Column("prompt_id", "int64", "the prompt's id in the stage", 0),
    Column("sample", "int32", "the number of the response among those to the prompt", 0),
    Column("part", "string", "the part of the method that trains the row (`teacher` in `brts`); empty: the method", 0),
    Column("pick", "string", "why the row has the columns of [picked rows](#picked-rows); null: it is not picked"),
    Column("prompt", "string", "the prompt's text, of a conversation that of its last message", 0),
    Column("prompt_messages", "string", "the whole conversation as JSON; null for a prompt that is a text"),
    Column("answer", "string", "the data's answer; JSON where it is no text"),
    Column(
        "student_reads",
        "string",
        "what the student reads, rendered, with special tokens; null in the teacher's held-out rows",
        0,
    ),
    Column(
        "teacher_reads",
        "string",
        "what the row's teacher reads, rendered with its own template, with the method's context; null if no teacher "
        "reads the prompt, and for a teacher of yours without a model in this process. Held out: for responses that "
        "the teacher wrote or scored",
        0,
    ),
    Column("images", IMAGES, "the [images](#images-of-rows) that the student reads, in order, with their pixels", 2),
    Column("teacher_images", IMAGES, "those that the teacher reads; null where `teacher_reads` is", 2),
    Column("box", "list<float64>", "the data's `box`: left, top, right, bottom in pixels of the first image", 2),
    Column("response", "string", "the text without special tokens", 0),
    Column("extracted", "string", "the part of the response that the reward compared; null: the reward does not say"),
    Column("reward", "float64", "null without a reward, and for rows of `follow`", 0),
    Column("finished", "bool", "whether the response ended before the limit", 0),
    Column("sampler_version", "int64", "the step of the weights that wrote it", 0),
    Column("response_ids", "list<int32>", "its tokens, in the student's vocabulary", 0),
    Column(
        "response_tokens",
        "list<string>",
        "the text of each; joined, they are the response with its special tokens. A character of several tokens is at "
        "the last of them, and bytes that are no character are U+FFFD",
        0,
    ),
    Column("trained", "list<bool>", "false: the student did not write the token (a tool, an environment)"),
    Column("turn", "list<int32>", "the token's turn: what an environment says before the student's words is in it"),
    Column(
        "turn_rewards", "list<float64>", "conversations: the environment's reward of each turn, null where it gave none"
    ),
    Column("turn_errors", "list<int32>", "conversations: how many calls and actions of each turn failed", 2),
    Column(
        "conversation",
        "string",
        "conversations: what happened, as JSON: the counts of the metrics `environment/...` that are not 0, such as "
        '`{"turns": 8, "tool_errors": 1, "turn_limit": 1}`',
        2,
    ),
    Column("sampler_logp", "list<float32>", "log-prob under the sampling distribution; 0 for a greedy token", 0),
    Column("policy_logp", "list<float32>", "log p: of the weights that sampled, or of the row's scores", 0),
    Column("teacher_logp", "list<float32>", "log q; of a unit in equal parts of its tokens", 0),
    Column("weight", "list<float32>", "the token's weight in the loss; null in held-out rows", 0),
    Column("advantage", "list<float32>", "the credit of a policy gradient; null in held-out rows", 0),
    Column(
        "signal",
        "list<float32>",
        "the method's loss per token before weight and denominator, from the forward that was trained on, nats for a "
        "divergence; of a unit in equal parts of its tokens. Null for a row or token that was not trained on. Held "
        "out, and `follow`: the exact reverse KL, where both models have one vocabulary in this process",
    ),
    Column("student_entropy", "list<float32>", "picked rows: entropy of p, nats"),
    Column("teacher_entropy", "list<float32>", "picked rows: entropy of q, nats"),
    Column("teacher_rank", "list<int32>", "picked rows: the token's place in the teacher's order; 0: its first choice"),
    Column("student_top_ids", "list<list<int32>>", "picked rows: the student's most likely tokens, in falling order"),
    Column("student_top_logp", "list<list<float32>>", "picked rows: their log-probs over the whole vocabulary"),
    Column("student_top_tokens", "list<list<string>>", "picked rows: their texts"),
    Column("teacher_top_ids", "list<list<int32>>", "picked rows: the teacher's, in its own vocabulary"),
    Column("teacher_top_logp", "list<list<float32>>", "picked rows: their log-probs over the whole vocabulary"),
    Column("teacher_top_tokens", "list<list<string>>", "picked rows: their texts, of the teacher's tokenizer"),
    Column("units", UNITS, "picked rows, two tokenizers: the compared pieces, as ranges of both models' tokens"),
    Column("teacher_tokens", "list<string>", "picked rows, two tokenizers: the response in the teacher's tokens"),
)
NAMES = tuple(column.name for column in COLUMNS)


def schema(reward: Mapping[str, Any] | None = None) -> Any:
    """The schema of a file. `reward`: {"name": ..., "correctness": bool}, or None without a reward."""
    import pyarrow as pa

    simple = {
        "string": pa.string(),
        "bool": pa.bool_(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float32": pa.float32(),
        "float64": pa.float64(),
    }
    places = ("student_start", "student_end", "teacher_start", "teacher_end")
    structs = {
        UNITS: pa.struct([(name, pa.int32()) for name in places]),
        IMAGES: pa.struct([("image", pa.string()), ("width", pa.int32()), ("height", pa.int32())]),
    }

    def _type(kind: str) -> Any:
        if kind in structs:
            return pa.list_(structs[kind])
        return pa.list_(_type(kind[5:-1])) if kind.startswith("list<") else simple[kind]

    about = {"format": FORMAT, "library": library_version(), "reward": None if reward is None else dict(reward)}
    return pa.schema([(c.name, _type(c.kind)) for c in COLUMNS], metadata={KEY: json.dumps(about)})


def library_version() -> str | None:
    """The version of the installed library."""
    try:
        return version("opd")
    except PackageNotFoundError:
        return None


def markdown() -> str:
    """The columns as the table of docs/run_folder.md."""
    rows = [f"| `{c.name}` | {c.kind.replace('|', chr(92) + '|')} | {c.since} | {c.text} |" for c in COLUMNS]
    return "\n".join(["| column | type | since | content |", "|---|---|---|---|", *rows])


def full_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns of the schema, null where a row lacks one."""
    unknown = {name for row in rows for name in row} - set(NAMES)
    assert not unknown, f"no columns of the format: {sorted(unknown)}"
    return {name: [row.get(name) for row in rows] for name in NAMES}
