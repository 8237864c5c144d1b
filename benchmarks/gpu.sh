#!/usr/bin/env bash
# The GPU's benchmarks, at most 10 minutes, without a network. docs/gpu.md has what they printed, and on which device.
#
#     benchmarks/gpu.sh [--quick]
#
# In this order: the Triton programs against float64; the loss against TRL's and Liger's at V = 151,936, N = 4,096 and
# 16,384; the step of 0.6B and 1.7B against TRL; a decode step of 1.7B with 64 rows; steps of the quickstart by phase;
# vLLM beside the trainer, its updates proved, and steps by phase. PYTHON is an interpreter with the packages of
# `make .venv/.bench`; OPD_VLLM is one with vLLM, without which that part is left out. --quick: small sizes, which a CPU
# can run too. Each part has a time limit; one that fails is named at the end, and the others run.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
quick=${1:-}
failed=
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT

part() { # name, limit in seconds, command
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    echo "== $name"
    timeout "$limit" "$@"
    status=$?
    echo "== $name: exit status $status after $((SECONDS - started)) s"
    [ "$status" = 0 ] || failed="$failed $name"
}

device=$("$python" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")
"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
part kernels 60 env OPD_TEST_DEVICE="$device" "$python" -m pytest -q -n0 tests/maths/test_kernels.py tests/models/test_products.py
part loss 130 "$python" benchmarks/loss.py $quick
part step 150 "$python" benchmarks/step.py $quick
part decode 80 "$python" benchmarks/decode.py $quick
part quickstart 90 "$python" -m opd train recipes/quickstart.yaml steps=4 evaluate=null output_dir="$run/quickstart"
"$python" - "$run/quickstart" <<'PRINT'
import json
import sys
from pathlib import Path
from statistics import median

for file in Path(sys.argv[1]).rglob("timings.jsonl"):
    steps = [json.loads(line) for line in file.read_text().splitlines()][1:]
    parts = [part for part in steps[0] if part != "step"]
    print("quickstart, seconds of a step:", {part: round(median(step[part] for step in steps), 3) for part in parts})
PRINT
if [ -n "${OPD_VLLM:-}" ]; then
    part engine 90 "$python" benchmarks/beside.py --vllm "$OPD_VLLM" $quick
else
    echo "== engine: left out, because OPD_VLLM names no Python with vLLM"
fi
echo "== all parts: $SECONDS s"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
