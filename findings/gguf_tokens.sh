#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: the tokenizer of a GGUF file is not that of the model.
#
# Expected: `tokenizer.ggml.pre: smollm` sets digits apart before other parts of a text are cut, so that the two line breaks of
# `a:\n\n1.` are one token; a control token such as DeepSeek's, with characters outside the byte alphabet, is one token.
# Seen: the name changes nothing, and `\n\n1` is cut as GPT-2 cuts it: two line breaks, each by itself. The control token is cut into
# its bytes ("a llama.cpp mislabel", in a comment of transformers). No error, no warning.
# Fails if either is read as llama.cpp reads it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import gguf
from transformers import PreTrainedTokenizerFast

printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
others = [byte for byte in range(256) if byte not in printable]
spelling = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
breaks = spelling[10] * 2
turn = "<\uff5cUser\uff5c>"
tokens = [*(spelling[byte] for byte in range(256)), breaks, turn, "<eos>"]

writer = gguf.GGUFWriter("vocabulary.gguf", "llama")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
writer.add_token_list(tokens)
writer.add_token_types([1] * 257 + [3, 3])
writer.add_token_merges([f"{spelling[10]} {spelling[10]}"])
writer.add_eos_token_id(258)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()

tokenizer = PreTrainedTokenizerFast.from_pretrained(".", gguf_file="vocabulary.gguf")
for text, right in (("a:\n\n1.", ["a", ":", breaks, "1", "."]), (f"a{turn}", ["a", turn])):
    given = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    print(f"{text!r}: {given}, and llama.cpp: {right}")
    assert given != right, "transformers now reads the file as llama.cpp does"
PY
