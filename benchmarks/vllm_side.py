"""vLLM's side of generate.py, for an interpreter with vLLM and without opd. Prints seconds of each round.

The request is one JSON argument: model folder, prompts as token ids, sampling, rounds.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    request = json.loads(sys.argv[1])
    engine = LLM(model=request["model"], dtype="float32", max_model_len=512, disable_log_stats=True)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    answers = []
    for new_tokens in [4] + [request["new_tokens"]] * request["rounds"]:  # the first is a warm-up
        sampling = SamplingParams(
            temperature=1.0, top_p=request["top_p"], max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        answers.append({"seconds": time.perf_counter() - start})
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
    print(json.dumps(answers[1:]))


if __name__ == "__main__":
    main()
