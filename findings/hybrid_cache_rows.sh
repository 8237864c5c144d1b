#!/usr/bin/env bash
# transformers 5.23.0: a hybrid model's cache does not keep rows with batch_select_indices; reorder_cache does.
#
# Expected: `DynamicCache.batch_select_indices(rows)` keeps these rows of everything that the cache holds, as it does for attention.
# Seen: a layer with a recurrent state alone (Qwen3-Next, Mamba 2) has no such method, so the call raises AttributeError. A layer with
# both (Falcon-H1) inherits the method of attention: keys and values keep the row, the states keep all rows, and nothing is said.
# `reorder_cache(rows)`, which beam search calls, selects from both, also fewer rows than there are.
# Fails if batch_select_indices selects the states.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def cache_of(model_type, **settings):
    torch.manual_seed(0)
    common = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **common, **settings)).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 17).view(3, 5), use_cache=True).past_key_values


def rows_of(cache):
    layer = cache.layers[0]
    states = [state for state in (*layer.conv_states.values(), *layer.recurrent_states.values()) if state is not None]
    return [len(state) for state in states], len(layer.keys) if hasattr(layer, "keys") else None


next_of = dict(
    num_hidden_layers=2, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8,
)
cache = cache_of("qwen3_next", **next_of)
try:
    cache.batch_select_indices(torch.tensor([2]))
    raise SystemExit("Qwen3-Next: batch_select_indices works")
except AttributeError as error:
    print("Qwen3-Next, batch_select_indices:", error)
cache = cache_of("qwen3_next", **next_of)
cache.reorder_cache(torch.tensor([2]))
print("Qwen3-Next, reorder_cache: rows of the states", rows_of(cache)[0])
assert set(rows_of(cache)[0]) == {1}

hybrid_of = dict(num_hidden_layers=1, head_dim=8, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
for method in ("batch_select_indices", "reorder_cache"):
    cache = cache_of("falcon_h1", **hybrid_of)
    getattr(cache, method)(torch.tensor([2]))
    states, keys = rows_of(cache)
    print(f"Falcon-H1, {method}: rows of the states {states}, of the keys {keys}")
    assert keys == 1
    assert set(states) == ({3} if method == "batch_select_indices" else {1}), "the behaviour has changed"
PY
