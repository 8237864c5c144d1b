#!/usr/bin/env bash
# transformers 5.23.0: Bamba reads a token after a cache at position 0 if no position_ids are given.
#
# Expected: without position_ids a decoder goes on at the position after the cache, as Llama, Granite 4 hybrid and Falcon-H1 do.
# Seen: Bamba's positions are those of a row that begins with the new token, although the cache counts its tokens right
# (get_seq_length() is 6). With position_ids the logits equal those of the whole row. `generate()` gives them, a loop of one's own need not.
# Fails if Bamba goes on where the cache ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def differences(model_type, **settings):
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, **common, num_hidden_layers=2, mamba_d_head=16, mamba_d_state=8, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    row = torch.randint(2, 60, (1, 7))
    found = []
    with torch.no_grad():
        whole = model(input_ids=row, use_cache=False).logits[0, 6]
        for given in ({}, {"position_ids": torch.tensor([[6]])}):
            cache = model(input_ids=row[:, :6], use_cache=True).past_key_values
            assert cache.get_seq_length() == 6
            out = model(input_ids=row[:, 6:], past_key_values=cache, use_cache=True, **given)
            found.append(float((out.logits[0, 0] - whole).abs().max()))
    print(f"{model_type}: the seventh token after a cache of six, largest difference of logits from the whole row:"
          f" without position_ids {found[0]:.0e}, with {found[1]:.0e}")
    return found


bamba = differences("bamba", attn_layer_indices=[1], mamba_n_heads=4, mamba_n_groups=1)
granite = differences(
    "granitemoehybrid", layer_types=["mamba", "attention"], mamba_n_heads=4, num_local_experts=2, num_experts_per_tok=1,
    position_embedding_type="rope",
)
assert max(bamba[1], *granite) < 5e-5
assert bamba[0] > 1e-2, "the behaviour has changed"
PY
