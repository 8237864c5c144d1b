"""The whole of on-policy distillation in one file, with torch and transformers alone.

    python examples/minimal.py                                                    a new tiny pair
    python examples/minimal.py --student PATH --teacher PATH --prompts FILE       your models, one prompt per line

The student writes, the teacher scores the student's own tokens, and the student descends the exact reverse KL,
KL(student || teacher), at each of them. The numbered steps in `distill` are those of the loop in `src/opd/train.py`,
which does the same with exchangeable sources, teachers and signals.

    shapes: B sequences, P prompt tokens, T response tokens, N trained tokens, V vocabulary
"""

import argparse
import random

import torch
import transformers
from torch import Tensor


def distill(student, teacher, tokenizer, prompts, options):
    """Train `student` in place; returns the exact reverse KL per token, in nats, of every step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
    sampling = sampling_of(student, tokenizer, options.max_completion_length)
    rng, history = random.Random(options.seed), []
    for step in range(options.steps):
        # 1 Prompts. Text alone: no reference answers are needed.
        texts = rng.sample(prompts, k=min(options.batch, len(prompts)))
        inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(student.device)

        # 2 Rollouts. The student samples at temperature 1 without truncation, from the distribution that is trained.
        ids = student.generate(**inputs, generation_config=sampling)  # [B, P + T]
        response = ids[:, inputs.input_ids.shape[1] :]  # [B, T]
        mask = up_to_the_end(response, sampling.eos_token_id)  # [B, T] bool, True where a token is trained

        # 3 The teacher's context: the same prompt. A privileged context would be added here.
        attention = torch.cat([inputs.attention_mask, mask.long()], dim=1)

        # 4 The teacher scores the student's tokens: its whole distribution at each of them, without gradient.
        with torch.no_grad():
            teacher_logp = log_probs(teacher, ids, attention, response.shape[1], len(tokenizer))  # [B, T, V]

        # 5 Credit and weight of each token. In plain distillation they are equal for all trained tokens.
        # 6 The one denominator: the trained tokens of the whole batch, counted before it is cut into micro-batches.
        count, kl = mask.sum(), 0.0
        for rows in torch.arange(len(ids), device=ids.device).split(options.micro_batch):
            # 7 The student reads the same tokens again, this time with gradient.
            student_logp = log_probs(student, ids[rows], attention[rows], response.shape[1], len(tokenizer))

            # 8 The formula, at trained tokens only: sum_v p (log p - log q). The gradient goes through p, never
            #   through the choice of the tokens and never through q.
            p, q = student_logp[mask[rows]], teacher_logp[rows][mask[rows]]  # [N, V]
            loss = (p.exp() * (p - q)).sum(-1).sum() / count
            loss.backward()
            kl += loss.item()

        # 9 Clip, step.
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # 10 The sampler gets the new weights. Here the student itself samples.
        # 11 Log. The loss is the exact KL per token, not an estimate.
        history.append(kl)
        if step % options.log_every == 0 or step == options.steps - 1:
            answer = tokenizer.decode(response[0][mask[0]], skip_special_tokens=True)
            print(f"step {step:4d}   KL per token {kl:7.4f} nats   {texts[0]!r} -> {answer!r}", flush=True)
        # 12 A checkpoint and an evaluation would come here.
    return history


def log_probs(model, ids, attention, length, vocabulary) -> Tensor:
    """Log-probabilities of the last `length` positions' tokens, [B, length, V], in float32.

    Rows of the output layer beyond the tokenizer are padding; teacher and student may have different numbers of them.
    """
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=attention, position_ids=positions, logits_to_keep=length + 1)
    return out.logits[:, :-1, :vocabulary].float().log_softmax(-1)


def up_to_the_end(response, end) -> Tensor:
    """True up to and including the first end-of-sequence token, [B, T]; the student sampled that token, too."""
    ended = torch.isin(response, torch.tensor(end, device=response.device)).long()
    return ended.cumsum(1) - ended == 0


def sampling_of(student, tokenizer, length) -> transformers.GenerationConfig:
    """Plain sampling: a model's defaults often truncate the distribution (top-k, top-p, penalties)."""
    ends = {"eos_token_id": student.generation_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    student.generation_config = transformers.GenerationConfig(**ends)
    return transformers.GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length, **ends)


def tiny_pair(options):
    """A teacher that has learned to sort letters, a smaller untrained student, and prompts for both."""
    rng = random.Random(options.seed)
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0, padding_side="left")  # every byte is a token
    teacher, student = tiny_llama(64, tokenizer), tiny_llama(48, tokenizer)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(options.teacher_steps):  # supervised: only the teacher sees answers
        words = ["".join(rng.choices("abcdef", k=4)) for _ in range(64)]
        ids = tokenizer([f"{word}>{''.join(sorted(word))}" for word in words], return_tensors="pt").input_ids
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)  # the prompt's five tokens are given
        teacher(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student, teacher, tokenizer, ["".join(rng.choices("abcdef", k=4)) + ">" for _ in range(1000)]


def tiny_llama(width, tokenizer):
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **shape, **ends))


def given_pair(options):
    """Your models and prompts; prompts in the chat template, if the tokenizer has one."""
    tokenizer, theirs = (transformers.AutoTokenizer.from_pretrained(p) for p in (options.student, options.teacher))
    if tokenizer.get_vocab() != theirs.get_vocab():
        raise ValueError("The tokenizers differ, so these two models cannot be compared token by token.")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    with open(options.prompts, encoding="utf-8") as file:
        prompts = [line.strip() for line in file if line.strip()]
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (load(p, dtype=torch.float32).to(device) for p in (options.student, options.teacher))
    return student, teacher, tokenizer, prompts


def main(arguments=None):
    parser = argparse.ArgumentParser(description="On-policy distillation with torch and transformers alone.")
    for name in ("student", "teacher", "prompts"):
        parser.add_argument(f"--{name}", help="default: a new tiny pair and its prompts")
    numbers = {"steps": 100, "batch": 64, "micro-batch": 32, "max-completion-length": 8, "teacher-steps": 150}
    for name, default in {**numbers, "log-every": 10, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="for a pretrained student try 1e-5")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    if len({bool(options.student), bool(options.teacher), bool(options.prompts)}) > 1:
        parser.error("--student, --teacher and --prompts go together")
    return distill(*(given_pair(options) if options.student else tiny_pair(options)), options)


if __name__ == "__main__":
    main()
