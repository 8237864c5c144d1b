#!/usr/bin/env bash
# transformers 5.23.0: Nemotron-H decodes token by token with another time step than it reads a prompt.
#
# Expected: reading a row at once and reading it token by token with the cache give the same logits, up to rounding.
# Seen: reading at once raises every time step (dt) to at least `time_step_min`, .001 by default; a step with the cache does not. Where
# dt is smaller, the states differ. With time_step_min at 1e-9 the two ways agree. Bamba, Mamba 2 and Falcon-H1 have the same two
# functions, and limits that nothing reaches by default.
# Fails if the two ways agree at the default.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def difference(minimum):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "nemotron_h", vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layers_block_type=["linear_attention", "full_attention"], num_hidden_layers=2, mamba_num_heads=4, mamba_head_dim=16,
        n_groups=1, ssm_state_size=8, chunk_size=8, time_step_min=minimum,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith("dt_bias"):
            torch.nn.init.constant_(parameter, -7.0)  # softplus(-7) is .0009
    row = torch.randint(2, 60, (1, 16))
    with torch.no_grad():
        whole = model(input_ids=row, use_cache=False).logits[0]
        out = model(input_ids=row[:, :6], use_cache=True)
        worst = 0.0
        for t in range(6, 16):
            out = model(input_ids=row[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            worst = max(worst, float((out.logits[0, 0] - whole[t]).abs().max()))
    return worst


default, none = difference(1e-3), difference(1e-9)
print(f"largest difference of logits, whole row against token by token: time_step_min .001: {default:.1e}, 1e-9: {none:.1e}")
assert none < 5e-5
assert default > 1e-3, "the behaviour has changed"
PY
