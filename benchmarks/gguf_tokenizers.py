"""The tokenizers of GGUF files against the token ids that llama.cpp's repository states for its test vocabularies.

    pip download llama-cpp-python==0.3.36 --no-binary llama-cpp-python --no-deps -d DOWNLOADS
    python benchmarks/gguf_tokenizers.py DOWNLOADS/llama_cpp_python-0.3.36.tar.gz

The source archive has llama.cpp's vocabularies (models/ggml-vocab-*.gguf), texts (.inp) and the ids that each model's
own tokenizer gives them (.out). Prints the table of docs/gguf.md. Needs neither weights nor a GPU, and no network.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opd.models.gguf_file import read_gguf
from opd.models.gguf_tokenizer import read_tokenizer

BETWEEN = "\n__ggml_vocab_test__\n"


def wrong(tokenizer: Any, texts: list[str], right: list[list[int]]) -> int:
    """The number of texts that get other ids."""
    given = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return sum(ids != expected for ids, expected in zip(given, right, strict=True))


def rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """Vocabulary, pre-tokenizer, texts, and of these the wrong ones of opd and of transformers."""
    from transformers import PreTrainedTokenizerFast

    for file in sorted(folder.rglob("ggml-vocab-*.gguf")):
        texts_file, ids_file = (file.with_name(f"{file.name}.{end}") for end in ("inp", "out"))
        if not texts_file.exists():
            continue
        read = read_gguf(file)
        texts = texts_file.read_text(encoding="utf-8").split(BETWEEN)
        right = [[int(i) for i in line.split()] for line in ids_file.read_text().split("\n")][: len(texts)]
        name = file.stem.removeprefix("ggml-vocab-")
        kind = f"{read.get('tokenizer.ggml.model')}, {read.get('tokenizer.ggml.pre') or 'none stated'}"
        try:
            ours = read_tokenizer(read)[0]
        except ValueError:  # transformers has no tokenizer of this model
            yield name, kind, str(len(texts)), "refused", "refused"
            continue
        theirs = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
        yield name, kind, str(len(texts)), str(wrong(ours, texts, right)), str(wrong(theirs, texts, right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "archive", type=Path, help="the source archive of llama-cpp-python, or a folder with its models"
    )
    archive: Path = parser.parse_args().archive
    with tempfile.TemporaryDirectory() as temporary:
        folder = archive
        if archive.is_file():
            folder = Path(temporary)
            with tarfile.open(archive) as packed:
                wanted = [one for one in packed.getmembers() if "/models/ggml-vocab-" in one.name]
                packed.extractall(folder, wanted, filter="data")
        print(f"| vocabulary | tokenizer.ggml.model, .pre | texts | opd | transformers {version('transformers')} |")
        print("|---|---|--:|--:|--:|")
        for row in rows(folder):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
