#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with bfloat16 products of AVX-512: a forward without gradient changes a 4-bit layer.
#
# Expected: a layer in eval() computes the same before and after a forward under no_grad, and `dequantize_4bit(weight.data,
# weight.quant_state)` gives its weight at any time; PEFT merges an adapter with that function.
# Seen: the first forward of `Linear4bit` whose input needs no gradient stores the weight in another order, with its scales
# rounded to bfloat16. A later forward that needs a gradient gives other numbers (a few 1e-3 of their size). `dequantize_4bit`
# reads the new order as the old one: it returns another matrix, without a word.
# Setting `layer.support_avx512bf16_for_cpu = False` before the first forward keeps weight and numbers.
# Ends with 0 and a line on a processor without these products. Fails if a forward leaves the layer as it was.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit


def layer_of(**attributes):
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(128, 64)
    layer = Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer = layer.to("cpu").eval()
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer, weight


def change(layer):
    """(relative change of a forward with gradient, and of the weight, by one forward without)."""
    inputs = torch.randn(5, 64)
    needing = inputs.clone().requires_grad_()
    before = layer(needing).detach()
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    with torch.no_grad():
        layer(inputs)
    after = layer(needing).detach()
    read = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().reshape(weight.shape)
    return float((after - before).norm() / before.norm()), float((read - weight).norm() / weight.norm())


layer, _ = layer_of()
if not layer.support_avx512bf16_for_cpu:
    print("This processor has no bfloat16 products of AVX-512: the weight stays as it is.")
    raise SystemExit(0)
numbers, matrix = change(layer)
print(f"one forward without gradient: a forward with gradient changes by {numbers:.1e} of its size, the weight read back by {matrix:.2f}")
assert numbers > 1e-5, "the behaviour has changed"
assert matrix > 0.5, "the behaviour has changed"
layer, _ = layer_of(support_avx512bf16_for_cpu=False)
numbers, matrix = change(layer)
print(f"with support_avx512bf16_for_cpu = False: {numbers:.1e} and {matrix:.2f}")
assert numbers == matrix == 0.0
PY
