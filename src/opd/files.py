"""Files that survive a kill: whole files are replaced atomically, lines are appended with one write each."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, DataError, RunError, TrainingError
from opd.types import Image

GIB = 1 << 30


def expanded(path: str | Path) -> Path:
    """The path with a home folder in place of `~` or `~USER`. Every path of a user comes through here.

    Raises ConfigError for a user without a home folder, and for a path that no file system has.
    """
    text = str(path)
    if "\0" in text or not is_unicode(text):
        raise ConfigError(f"The path {text!r} holds a character that no path has. Correct it.")
    try:
        return Path(path).expanduser() if text.startswith("~") else Path(path)  # a folder `./~` is none
    except RuntimeError as error:
        name = text.partition("/")[0]
        raise ConfigError(
            f"The path {text!r} begins with {name}, a home folder that does not exist. Write ./{text} "
            "for a folder of that name, or the whole path."
        ) from error


def cache_dir() -> Path:
    """The folder of everything that can be made again: OPD_CACHE, or ~/.cache/opd."""
    return expanded(os.environ.get("OPD_CACHE", "~/.cache/opd"))


def is_unicode(text: str) -> bool:
    """Whether the text has no half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_GO_ON = "Free space or allow writing there, then start the same command again."


def append_line(file: Path, step: int, numbers: Mapping[str, float]) -> None:
    """Append `{"step": ..., names sorted}` with one `write`, so that a kill leaves at most one partial last line.

    Raises:
        TrainingError: a number is NaN or infinite.
        RunError: the line could not be written.
    """
    assert "step" not in numbers
    check_finite(f"step {step}", numbers)
    append_row(file, {"step": step, **{name: numbers[name] for name in sorted(numbers)}}, f"step {step}")


def append_row(file: Path, row: Mapping[str, Any], what: str) -> None:
    """Append a row as a line of JSON with one `write`. Raises RunError, which names `what`, if that fails.

    A partial last line, which a kill left, stays a line of its own.
    """
    line = (json.dumps(dict(row)) + "\n").encode()
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)  # less the umask
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RunError(f"{file} could not be written ({error.strerror or error}). {_GO_ON}") from error
    if written != len(line):
        raise RunError(f"{file} took only {written} of the {len(line)} bytes of {what} (disk full?). {_GO_ON}")


def read_lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The complete lines of numbers, each as bytes and as a row with its `step`. Raises RunError as `read_rows`."""
    rows: list[tuple[bytes, dict[str, Any]]] = []
    for number, (line, row) in enumerate(read_rows(file), start=1):
        try:
            rows.append((line, {"step": int(row["step"]), **row}))
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(file, number, error) from error
    return rows


def read_rows(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The complete lines, each as bytes and as a row, without a partial last line; empty for a missing file.

    Raises:
        RunError: the file cannot be read, or a complete line is damaged.
    """
    try:
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror or error}).") from error
    rows: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
            rows.append((line, {**row}))
        except (ValueError, TypeError) as error:
            raise _damaged(file, number, error) from error
    return rows


def _damaged(file: Path, number: int, error: Exception) -> RunError:
    return RunError(f"{file}, line {number} is damaged ({error!r}). Remove that line to continue.")


def check_finite(what: str, value: Any, name: str = "") -> None:
    """Refuse NaN and infinity, which JSON cannot hold and which mean a broken run.

    Raises:
        TrainingError: a number in the value, at any depth, is NaN or infinite; the message names it.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_finite(what, inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            check_finite(what, inner, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise TrainingError(
            f"In {what}, {name!r} is {value}. The step before failed, most often because the learning rate is too "
            "high; checkpoints are untouched. Lower it, or check the metrics of the last steps."
        )


def opened_image(image: Image, where: str) -> Any:
    """The image as a PIL image in RGB. Raises DataError, beginning with `where`, for a file that is not one."""
    try:
        from PIL import Image as Pillow
        from PIL import UnidentifiedImageError
    except ImportError as error:
        raise ConfigError(f"{where} has images, which need pillow: pip install 'opd[vision]'.") from error
    try:
        content = image.content if image.path is None else image.path.read_bytes()
        return in_rgb(Pillow.open(io.BytesIO(content or b"")), f"{where}: {image.name}")
    except DataError:
        raise
    except Exception as error:  # of a damaged file pillow raises any type
        why = "pillow knows no such format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(
            f"{where}: {image.name} is not a readable image ({' '.join(why.split()):.200}). Give a PNG, a JPEG "
            "or another format of pillow."
        ) from error


def in_rgb(opened: Any, what: str) -> Any:
    """A PIL image in RGB, upright as its EXIF says, as `datasets` and transformers read it.

    Raises DataError, beginning with `what`, for several frames, and for more than 8 bits a channel, of which pillow
    makes white or black.
    """
    from PIL import ImageOps

    if getattr(opened, "is_animated", False) and opened.format != "MPO":  # a photo with a preview
        raise DataError(
            f"{what} has {opened.n_frames} frames, and an image is one. Save the frames as files of their own, and "
            "list them in `images`."
        )
    if opened.mode.startswith(("I", "F")):
        raise DataError(
            f"{what} has the mode {opened.mode} of pillow, more than 8 bits a channel, and in RGB it would be cut to "
            "white or black. Scale it, and save it with 8 bits."
        )
    return ImageOps.exif_transpose(opened).convert("RGB")


def encoded_image(drawn: Any, name: str) -> Image:
    """A PIL image as an `Image`: PNG keeps every pixel."""
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG")
    content = buffer.getvalue()
    return Image(name=name, digest=hashlib.sha256(content).hexdigest(), content=content)


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(file: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write the whole file, or leave the old one. A callable writes to the path that it gets.

    Raises:
        RunError: the file could not be written; a partial file is removed.
    """
    part = file.with_name(f".{file.name}.writing-{os.getpid()}")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync_path(part)
        os.replace(part, file)
        fsync_path(file.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the cause may also prevent the removal
            part.unlink()
        if isinstance(error, OSError):
            raise refused(file, error) from error
        raise


def follow_umask(folder: Path) -> None:
    """Give the files of a folder the mode of a new file. safetensors writes for the owner alone."""
    new = folder / ".mode"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in folder.iterdir():
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of atomic writes in a folder."""
    for part in folder.glob(".*.writing-*"):
        part.unlink(missing_ok=True)


def unfit(file: Path) -> str:
    """Why a file cannot be written at this path; empty if it can."""
    if file.is_dir():
        return "is a folder"
    return "" if file.parent.is_dir() else f"is in a folder that does not exist, {file.parent}"


def refused(path: Path, error: OSError) -> RunError:
    why = error.strerror or str(error)
    return RunError(
        f"{path} cannot be written ({why}). Free space or allow writing there, or use another output_dir=..., then "
        "start the same command again."
    )


def write_table(file: Path, columns: Mapping[str, list[Any]], schema: Any) -> Path:
    """Write columns of a pyarrow `schema`, which has all their names, atomically.

    Raises:
        DataError: a column holds values of another type.
        RunError: the file could not be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays: list[Any] = []
    for kind in schema:
        try:
            arrays.append(pa.array(columns[kind.name], kind.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{file.name}: column {kind.name!r} holds values that are no {kind.type} ({error}). Use one type there "
                "in every row."
            ) from error
    table = pa.Table.from_arrays(arrays, schema=schema)
    write_atomically(file, lambda part: pq.write_table(table, part, compression="zstd", **encodings(schema)))
    return file


def encodings(schema: Any) -> dict[str, Any]:
    """The options with which pyarrow writes a Parquet file of this schema.

    A column of long texts, such as rendered prompts, holds each different text once.
    """
    repeated = [path for column in schema for path in _repeating(column.name, column.type)]
    return {"use_dictionary": repeated, "dictionary_pagesize_limit": GIB}


def _repeating(name: str, kind: Any) -> list[str]:
    """The path of a Parquet column whose values repeat, empty for floating-point numbers."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return _repeating(f"{name}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [path for one in kind for path in _repeating(f"{name}.{one.name}", one.type)]
    return [] if pa.types.is_floating(kind) else [name]


def read_table(file: Path) -> list[dict[str, Any]]:
    """All rows of a file that `write_table` wrote. Raises RunError if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{file} cannot be read ({error}). Copy it again, or remove it to go on without it.") from error


def tensor_shapes(file: Path, label: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a safetensors file, without their values.

    Raises ConfigError, which starts with `label`, for a damaged or partial file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise ConfigError(
            f"{label}: {file} ({size:,} bytes) is not a whole safetensors file: {error}. Copy or download it again."
        ) from error
