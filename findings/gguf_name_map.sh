#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: from_pretrained(gguf_file=...) builds gguf's name map once per module, not once.
#
# Expected: one map of tensor names for a model, and one pass over the file's metadata.
# Seen: a llama of 2 layers has 33 modules and builds the map 33 times, one of 8 layers has 111 and builds it 111 times. Each map has
# an entry for every tensor of every layer, so this work grows with the square of the depth. The file is opened twice, once for the
# config and once for the weights, and its metadata is parsed each time.
# Fails if a model no longer builds one map per module.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

HIDDEN, INNER, HEADS, TOKENS = 16, 32, 2, 8


def write(path, layers):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(TOKENS)])
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (TOKENS, HIDDEN), "output": (TOKENS, HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.ffn_{name}": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (HIDDEN, INNER)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


made, read = [], []
get_map, reader = gguf.get_tensor_name_map, gguf.GGUFReader.__init__
gguf.get_tensor_name_map = lambda *args: made.append(1) or get_map(*args)
gguf.GGUFReader.__init__ = lambda self, *args, **options: read.append(1) or reader(self, *args, **options)
for layers in (2, 8):
    made.clear()
    read.clear()
    write(f"{layers}.gguf", layers)
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{layers}.gguf", dtype=torch.float32)
    modules = sum(1 for _ in model.modules())
    print(f"{layers} layers, {modules} modules: {len(made)} name maps, the file opened {len(read)} times")
    assert len(made) == modules, "a model no longer builds one name map per module"
PY
