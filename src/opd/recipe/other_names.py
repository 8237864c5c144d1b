"""Names that other trainers use for keys of a recipe: what is accepted, and what a message says of the others.

The table is docs/coming_from.md too (`make docs`). A name was read in the package of its library, in the version below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LIBRARIES = {  # the versions whose files were read, and where
    "hf": ("transformers 5.23.0", "`TrainingArguments`, of TRL, ms-swift and axolotl too"),
    "trl": (
        "TRL 1.16.0",
        "`DistillationConfig`, `AsyncDistillationConfig`, `GKDConfig`, `GOLDConfig`, `IWOPDConfig`, `SDFTConfig`, "
        "`GRPOConfig`, `ModelConfig`, `ScriptArguments`",
    ),
    "peft": ("PEFT 0.21.2", "`LoraConfig`"),
    "swift": ("ms-swift 4.6.0", "`swift rlhf --rlhf_type gkd`"),
    "axolotl": ("axolotl 0.19.0", "its YAML, with the plugin `kd`"),
    "verl": ("verl 0.9.1", "`ppo_trainer.yaml` with `distillation`"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A name, the key here (None: there is none), what to add, and the libraries that have the name."""

    name: str
    key: str | None
    note: str
    of: str

    @property
    def says(self) -> str:
        """What a message says of the name."""
        return f"No such key: {self.note}." if self.key is None else f"Here it is `{self.key}`{self.note}."

    @property
    def libraries(self) -> list[str]:
        """The keys of `LIBRARIES`."""
        return self.of.split()


# Section -> a name that means what a key of that section means, whatever its value.
ACCEPTED: dict[str, dict[str, str]] = {
    "Lora": {"r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha"},
    "SamplingSection": {"max_new_tokens": "max_completion_length", "stop_words": "stop"},
    "OptimizerSection": {"lr": "learning_rate"},
    "ModelSpec": {"model_name_or_path": "path", "attn_impl": "attn_implementation"},
}

_STEPS = "set `steps`; an epoch is the number of prompts / `prompts_per_step`"
_AFTER = "a finished model is uploaded by `opd push RUN OWNER/NAME`"
_RANKS = "`torchrun --nproc-per-node N -m opd train RECIPE` shares a step, with the student in shards (FSDP2)"
_WEIGHT = "the weight of a divergence is a method's option, if it has one (`opd describe METHOD`)"
_TEACHER = ", and `teacher: NAME` in the stage"
_STUDENT = ", and `train: NAME` in the stage"
_PACKED = "tokens are packed in every forward pass, and `micro_batch_tokens` limits how many"
_DROPOUT = "models train without dropout"
_ONCE = "rows are read once, before the run"
_ONE_UPDATE = "a step makes one update, from responses of its own"
_WHOLE = "a prompt that is longer than `max_prompt_length` is an error, and none is cut or left out"
_LORA = "an adapter has `models.NAME.lora.rank`, `models.NAME.lora.alpha` and `models.NAME.lora.target_modules`"
_OWN = "your own code is named where it is used, as my_package.mine:function"
_SHOWN = "responses of every `samples_every` steps are in the run's folder"

ROWS = (
    # optimiser
    Row("learning_rate", "optimizer.learning_rate", "", "hf"),
    Row("lr", "optimizer.learning_rate", "", "verl"),
    Row("lr_scheduler_type", "optimizer.schedule", " (constant, linear, cosine)", "hf verl"),
    Row("lr_scheduler", "optimizer.schedule", " (constant, linear, cosine)", "axolotl"),
    Row("warmup_steps", "optimizer.warmup_steps", "", "hf axolotl"),
    Row("warmup_ratio", "optimizer.warmup_steps", ", a number of steps", "axolotl"),
    Row("lr_warmup_steps", "optimizer.warmup_steps", "", "verl"),
    Row("lr_warmup_steps_ratio", "optimizer.warmup_steps", ", a number of steps", "verl"),
    Row("weight_decay", "optimizer.weight_decay", "", "hf axolotl verl"),
    Row("max_grad_norm", "optimizer.max_grad_norm", "", "hf axolotl"),
    Row("clip_grad", "optimizer.max_grad_norm", "", "verl"),
    Row("adam_beta1", "optimizer.betas", ", a pair", "hf axolotl"),
    Row("adam_beta2", "optimizer.betas", ", a pair", "hf axolotl"),
    Row("adam_epsilon", "optimizer.eps", "", "hf axolotl"),
    Row("optim", "optimizer.name", " (adamw, adamw_8bit, muon)", "hf"),
    # sizes of a step
    Row("per_device_train_batch_size", "prompts_per_step", ", of all devices, times `sampling.n` responses", "hf"),
    Row("batch_size", "prompts_per_step", ", times `sampling.n` responses", "axolotl"),
    Row("train_batch_size", "prompts_per_step", ", times `sampling.n` responses", "verl"),
    Row("ppo_mini_batch_size", "prompts_per_step", ": a step makes one update", "verl"),
    Row("micro_batch_size", "micro_batch_tokens", ", in tokens; it changes no result", "axolotl"),
    Row("ppo_max_token_len_per_gpu", "micro_batch_tokens", "; it changes no result", "verl"),
    Row("ppo_micro_batch_size_per_gpu", "micro_batch_tokens", ", in tokens; it changes no result", "verl"),
    Row("global_batch_size", "prompts_per_step", ", times `sampling.n` responses", "swift"),
    Row("use_dynamic_bsz", "micro_batch_tokens", ", in tokens; it changes no result", "verl"),
    Row("num_iterations", None, _ONE_UPDATE, "trl"),
    Row("steps_per_generation", None, _ONE_UPDATE, "trl"),
    Row("max_staleness", "ahead", ": 0 or 1 steps", "trl"),
    Row("generation_batch_size", None, "a step's responses are drawn together", "trl axolotl"),
    Row("per_device_eval_batch_size", None, "held-out responses are drawn together", "hf"),
    Row(
        "gradient_accumulation_steps",
        None,
        "`prompts_per_step` is the whole step, and `micro_batch_tokens` limits what is in memory at once",
        "hf axolotl",
    ),
    # length of a run, checkpoints, evaluations
    Row("max_steps", "steps", "", "hf axolotl"),
    Row("total_training_steps", "steps", "", "verl"),
    Row("num_train_epochs", None, _STEPS, "hf"),
    Row("num_epochs", None, _STEPS, "axolotl"),
    Row("total_epochs", None, _STEPS, "verl"),
    Row("epochs", None, _STEPS, ""),
    Row("save_steps", "checkpoint.every", "", "hf axolotl"),
    Row("save_freq", "checkpoint.every", "", "verl"),
    Row("save_only_model", None, "the trained model is saved when a stage ends, besides `checkpoint`", "hf"),
    Row("save_total_limit", "checkpoint.keep", "", "hf axolotl"),
    Row("eval_steps", "evaluate.every", "", "hf axolotl"),
    Row("test_freq", "evaluate.every", "", "verl"),
    Row("eval_strategy", "evaluate.every", ", in steps; 0: before and after training only", "hf axolotl"),
    Row("val_before_train", "evaluate.before", "", "verl"),
    Row("split_dataset_ratio", "evaluate.data", ", rows of their own, e.g. by `data.skip` and `data.limit`", "swift"),
    Row("val_set_size", "evaluate.data", ", rows of their own, e.g. by `data.skip` and `data.limit`", "axolotl"),
    Row("resume_from_checkpoint", None, "the same command goes on from the last checkpoint", "hf axolotl"),
    Row("logging_steps", None, "every step is a line of metrics.jsonl", "hf axolotl"),
    Row("log_completions_steps", "samples_every", "", "trl"),
    Row("log_completions", "samples_every", " (steps)", "trl swift axolotl"),
    Row("run_name", "name", " of the recipe", "hf"),
    Row("experiment_name", "name", " of the recipe", "verl"),
    Row("output_dir", "output_dir", " of the recipe", "hf axolotl"),
    Row("seed", "seed", " of the recipe", "hf axolotl"),
    Row("data_seed", "seed", " of the recipe", "hf swift"),
    Row("report_to", "report_to", " of the recipe", "hf"),
    Row("logger", "report_to", " of the recipe", "verl"),
    Row("use_wandb", "report_to", ": [wandb]", "axolotl"),
    Row("wandb_project", "report_to", ": [wandb]; WANDB_PROJECT names the project", "axolotl"),
    Row("project_name", "report_to", ": [wandb]; WANDB_PROJECT names the project", "verl"),
    Row("push_to_hub", None, _AFTER, "hf swift"),
    Row("hub_model_id", None, _AFTER, "hf swift axolotl"),
    Row("num_completions_to_print", None, _SHOWN, "trl axolotl"),
    # models
    Row("model_name_or_path", "models.NAME.path", _STUDENT, "trl"),
    Row("base_model", "models.NAME.path", _STUDENT, "axolotl"),
    Row("model", "models.NAME.path", _STUDENT, "swift"),
    Row("model_revision", None, "give the folder of that revision as `models.NAME.path`", "trl swift"),
    Row("model_init_kwargs", "models.NAME.dtype", " and the keys beside it, each by its name", "trl"),
    Row("dtype", "models.NAME.dtype", " (float32, bfloat16)", "trl"),
    Row("torch_dtype", "models.NAME.dtype", " (float32, bfloat16)", "swift"),
    Row("bf16", "models.NAME.autocast", ", or `models.NAME.dtype` bfloat16", "hf axolotl"),
    Row("fp16", "models.NAME.autocast", ", in bfloat16", "hf axolotl"),
    Row("attn_implementation", "models.NAME.attn_implementation", "", "trl axolotl"),
    Row("attn_impl", "models.NAME.attn_implementation", "", "swift"),
    Row("flash_attention", "models.NAME.attn_implementation", ": flash_attention_2", "axolotl"),
    Row("gradient_checkpointing", "models.NAME.gradient_checkpointing", "", "hf axolotl"),
    Row("enable_gradient_checkpointing", "models.NAME.gradient_checkpointing", "", "verl"),
    Row("trust_remote_code", "models.NAME.trust_remote_code", "", "trl axolotl verl"),
    Row("device_map", "models.NAME.device", "; " + _RANKS, "swift axolotl"),
    Row("chat_template_path", "models.NAME.chat_template", ", jinja or a file of it", "trl"),
    Row("chat_template", "models.NAME.chat_template", ", jinja or a file of it", "axolotl"),
    Row("chat_template_kwargs", "models.NAME.template_options", "", "trl axolotl"),
    Row("enable_thinking", "models.NAME.template_options", ": {enable_thinking: false}", "swift"),
    Row("router_aux_loss_coef", "router_aux_loss", "", "trl"),
    Row("disable_dropout", None, _DROPOUT, "trl"),
    Row("deepspeed", None, _RANKS, "hf axolotl"),
    Row("fsdp", None, _RANKS, "hf axolotl"),
    Row("n_gpus_per_node", None, _RANKS, "verl"),
    Row("nnodes", None, _RANKS, "verl"),
    Row("use_liger_kernel", None, "losses are computed chunk by chunk, without the logits of all tokens", "hf"),
    Row("dataloader_num_workers", None, _ONCE, "hf"),
    Row("plugins", None, _OWN, "axolotl"),
    Row("external_plugins", None, _OWN, "swift"),
    Row("torch_compile", None, "what is compiled is decided by the library", "hf axolotl"),
    # adapters and quantisation
    Row("lora", "models.NAME.lora", ", e.g. {rank: 16}", ""),
    Row("use_peft", "models.NAME.lora", ", e.g. {rank: 16}", "trl"),
    Row("adapter", "models.NAME.lora", ", e.g. {rank: 16}", "axolotl"),
    Row("tuner_type", "models.NAME.lora", ", e.g. {rank: 16}; without it all weights are trained", "swift"),
    Row("r", "models.NAME.lora.rank", "", "peft"),
    Row("lora_r", "models.NAME.lora.rank", "", "trl axolotl"),
    Row("lora_rank", "models.NAME.lora.rank", "", "swift verl"),
    Row("lora_alpha", "models.NAME.lora.alpha", "", "peft trl swift axolotl verl"),
    Row("lora_target_modules", "models.NAME.lora.target_modules", "", "trl axolotl"),
    Row("target_modules", "models.NAME.lora.target_modules", "", "peft swift verl"),
    Row("lora_target_linear", "models.NAME.lora.target_modules", ": all-linear", "axolotl"),
    Row("load_in_4bit", "models.NAME.quantization", ", e.g. {} for nf4", "trl axolotl"),
    Row("load_in_8bit", None, "weights have 4 bits with `models.NAME.quantization`, or 16 or 32", "trl axolotl"),
    Row("quant_method", "models.NAME.quantization", ", e.g. {} for nf4 by bitsandbytes", "swift"),
    Row("quant_bits", "models.NAME.quantization.bits", "", "swift"),
    Row("bnb_4bit_quant_type", "models.NAME.quantization.type", "", "trl swift"),
    Row("use_bnb_nested_quant", "models.NAME.quantization.double", "", "trl"),
    Row("bnb_4bit_use_double_quant", "models.NAME.quantization.double", "", "swift"),
    Row("use_dora", None, _LORA, "trl peft"),
    Row("use_rslora", None, _LORA, "trl peft"),
    Row("lora_modules_to_save", None, _LORA, "trl axolotl"),
    Row("modules_to_save", None, _LORA, "peft"),
    Row("lora_dropout", None, _DROPOUT, "peft trl swift axolotl"),
    # teachers
    Row("teacher_model_name_or_path", "models.NAME.path", _TEACHER, "trl"),
    Row("teacher_model", "models.NAME.path", _TEACHER, "swift"),
    Row("model_path", "models.NAME.path", _TEACHER, "verl"),
    Row("teacher_model_init_kwargs", "models.NAME.dtype", " and the keys beside it, of the teacher's section", "trl"),
    Row("teacher_tokenizer_name_or_path", "method", ": simct or uld reads a teacher of another tokenizer", "trl"),
    Row("teacher_model_server", "models.NAME.server.urls", _TEACHER, "swift"),
    Row("teacher_model_server_url", "models.NAME.server.urls", _TEACHER, "trl"),
    Row("teacher_server_urls", "models.NAME.server.urls", ", of a model for each teacher", "trl"),
    Row("kd_online_server", "models.NAME.server", ", on vLLM", "axolotl"),
    Row("kd_online_timeout", "models.NAME.server.timeout_s", "", "axolotl"),
    Row("teacher_model_revision", None, "give the folder of that revision as `models.NAME.path`", "trl swift"),
    Row(
        "teacher_adapters", "models.NAME.path", ", the folder of the adapter, and `teacher: NAME` in the stage", "swift"
    ),
    Row("teacher_deepspeed", None, _RANKS, "swift"),
    Row("teacher_models", "models", ", an entry for each, and `teacher: NAME` in the stage or task", "verl"),
    Row("teacher_key", "tasks", ", each with its `teacher`", "verl"),
    Row("use_teacher_server", "models.NAME.server.urls", _TEACHER, "trl"),
    Row("kd_online_server_base_url", "models.NAME.server.urls", _TEACHER, "axolotl"),
    Row("offload_teacher_model", "models.NAME.offload", ", of the teacher", "swift"),
    # losses
    Row("lmbda", "options.on_policy_share", " of the method gkd (1 here, 0.5 in TRL)", "trl swift"),
    Row("seq_kd", "method", ": sft, with `options` {source: teacher}", "trl swift"),
    Row(
        "beta",
        "options.beta",
        " of the method gkd: 0 is forward KL, 1 reverse KL. AdamW has `optimizer.betas`",
        "trl swift axolotl",
    ),
    Row("kd_beta", "options.beta", " of the method gkd", "axolotl"),
    Row("kd_temperature", "options.temperature", " of the method, for both models", "axolotl"),
    Row("teacher_temperature", "options.temperature", " of the method, for both models", "trl"),
    Row("kd_alpha", None, _WEIGHT, "axolotl"),
    Row("kd_ce_alpha", None, "a stage with `method` sft trains on references, before or after", "axolotl"),
    Row("sft_alpha", None, "a stage with `method` sft trains on references, before or after", "swift"),
    Row("kl_coef", None, _WEIGHT, "swift"),
    Row("kl_loss_coef", None, _WEIGHT, "verl"),
    Row("distillation_loss_coef", None, _WEIGHT, "verl"),
    Row("gkd_logits_topk", "options.k", " of the method topk_reverse_kl", "swift"),
    Row("kd_online_topk", "options.k", " of the method topk_reverse_kl", "axolotl"),
    Row("loss_top_k", "options.k", " of the method topk_reverse_kl", "trl"),
    Row("topk", "options.k", " of the method topk_reverse_kl", "verl"),
    Row("teacher_top_k", "options.k", " of the method topk_forward_kl, or of topk_reverse_kl", "trl"),
    Row("add_tail_bucket", "options.form", " of the method topk_forward_kl: tail", "trl"),
    Row("reverse_kl_top_1_mode", "method", ": opd scores the sampled token", "trl"),
    Row("loss_add_tail", "options.form", " of the method topk_reverse_kl: tail", "trl"),
    Row("use_uld_loss", "method", ": uld, or simct", "trl"),
    Row("uld_use_hybrid_loss", "options.matched", " of the method uld", "trl"),
    Row("use_extended_uld", "method", ": simct compares the pieces that both tokenizers cut", "trl"),
    Row("uld_crossentropy_weight", None, "a stage with `method` sft trains on references, before or after", "trl"),
    Row("uld_distillation_weight", None, _WEIGHT, "trl"),
    Row("uld_student_temperature", "options.temperature", " of the method uld, for both models", "trl"),
    Row("uld_teacher_temperature", "options.temperature", " of the method uld, for both models", "trl"),
    Row("distillation_topk", "options.k", " of the method sdft", "trl"),
    Row("distillation_alpha", "options.beta", " of the method sdft: 0 is forward KL, 1 reverse KL", "trl"),
    Row("teacher_update_rate", "options.decay", " of the method sdft: 1 - teacher_update_rate", "trl"),
    Row("teacher_prompt_template", "options.template", " of the method sdft", "trl"),
    Row("iw_opd_gamma", "options.gamma", " of the method iw_opd", "trl"),
    Row("iw_opd_epsilon", "options.epsilon", " of the method iw_opd", "trl"),
    Row("distillation_objective", "method", ", which names the loss: `opd methods`", "trl"),
    Row("loss_mode", "method", ", which names the loss: `opd methods`", "verl"),
    Row("distillation", "method", ", which names the loss: `opd methods`", "verl"),
    Row("distillation_loss", "method", ", which names the loss: `opd methods`", "verl"),
    Row("algorithm", "method", ", which names the loss: `opd methods`", "verl"),
    Row("kd_trainer", "method", ", which names the loss: `opd methods`", "axolotl"),
    Row("rl", "method", ": grpo, ...", "axolotl"),
    Row("adv_estimator", "method", ": grpo, ...", "verl"),
    Row("use_policy_gradient", "method", ": opd is the policy gradient of the sampled token", "verl"),
    Row("critic", None, "no method trains a critic", "verl"),
    Row("loss_type", "method", ", which names the loss: `opd methods`", "trl swift axolotl"),
    Row("rlhf_type", "method", ": gkd, grpo, ...", "swift"),
    Row("advantage_estimator", "method", ": grpo, ...", "axolotl"),
    Row("scale_rewards", "options.variant", " of the method grpo: dr_grpo does not divide by the deviation", "trl"),
    Row("epsilon", "options.clip_low", " of the method grpo", "trl axolotl"),
    Row("epsilon_high", "options.clip_high", " of the method grpo", "trl axolotl"),
    Row("use_task_rewards", "reward", ", with a method that reads it: mopd, uni_opd, grpo", "verl"),
    # sampling
    Row("max_new_tokens", "sampling.max_completion_length", "", "trl swift"),
    Row("max_completion_length", "sampling.max_completion_length", "", "trl swift axolotl"),
    Row("max_response_length", "sampling.max_completion_length", "", "verl"),
    Row("response_length", "sampling.max_completion_length", "", "swift verl"),
    Row("max_length", "sampling.max_completion_length", " for responses, `max_prompt_length` for prompts", "trl swift"),
    Row("max_seq_length", "sampling.max_completion_length", " for responses, `max_prompt_length` for prompts", ""),
    Row("sequence_len", "sampling.max_completion_length", " for responses, `max_prompt_length` for prompts", "axolotl"),
    Row("max_prompt_len", "max_prompt_length", "", "axolotl"),
    Row("num_generations", "sampling.n", "", "trl swift axolotl"),
    Row("rollout_n", "sampling.n", "", "verl"),
    Row("temperature", "sampling.temperature", "", "trl swift axolotl verl"),
    Row("top_p", "sampling.top_p", "", "trl swift axolotl verl"),
    Row("top_k", "sampling.top_k", " (0: off)", "trl swift axolotl verl"),
    Row("min_p", None, "sampling is limited by `sampling.top_p` and `sampling.top_k`", "trl axolotl"),
    Row("repetition_penalty", None, "the loss needs the probabilities that the student has", "trl swift axolotl"),
    Row("stop_words", "sampling.stop", "", "swift"),
    Row("generation_kwargs", "sampling", ", with its own keys", "trl axolotl"),
    Row("actor_rollout_ref", None, "its parts are `models.NAME`, `optimizer`, `sampling` and `engine`", "verl"),
    Row("use_vllm", "engine", ", e.g. {start: {}}", "trl axolotl"),
    Row("vllm_server_base_url", "engine.urls", "", "trl"),
    Row("vllm_server_port", "engine.urls", "", "trl"),
    Row("vllm_server_host", "engine.urls", "", "trl axolotl"),
    Row("vllm_mode", "engine.start", ", or `engine.urls` for servers that run", "trl axolotl"),
    Row("vllm_enable_sleep_mode", "engine.sleep", "", "trl axolotl"),
    Row("sleep_level", "engine.sleep", "", "swift"),
    Row("vllm_max_model_length", "engine.start.flags", ": [--max-model-len=4096]", "trl"),
    Row("vllm_max_model_len", "engine.start.flags", ": [--max-model-len=4096]", "swift"),
    Row("gpu_memory_utilization", "engine.start.flags", ": [--gpu-memory-utilization=0.3]", "verl"),
    Row("tensor_model_parallel_size", "engine.start.flags", ": [--tensor-parallel-size=2]", "verl"),
    Row("multi_turn_scheduler", "environment", "", "swift"),
    Row("vllm_gpu_memory_utilization", "engine.start.flags", ": [--gpu-memory-utilization=0.3]", "trl"),
    Row("vllm_tensor_parallel_size", "engine.start.flags", ": [--tensor-parallel-size=2]", "trl"),
    # data and rewards
    Row("dataset", "data.path", "", "swift"),
    Row("datasets", "data.path", ", or `tasks` for several", "axolotl"),
    Row("dataset_name", "data.path", "", "trl"),
    Row("train_dataset", "data.path", "", "trl"),
    Row("train_files", "data.path", "", "verl"),
    Row("eval_dataset", "evaluate.data.path", "", "trl"),
    Row("val_dataset", "evaluate.data.path", "", "swift"),
    Row("val_files", "evaluate.data.path", "", "verl"),
    Row("test_datasets", "evaluate.data.path", "", "axolotl"),
    Row("dataset_train_split", "data.split", "", "trl"),
    Row("dataset_num_proc", None, _ONCE, "trl swift"),
    Row("dataset_prepared_path", None, _ONCE, "axolotl"),
    Row("shuffle_dataset", None, "the order of the prompts is drawn from `seed`", "trl"),
    Row("remove_unused_columns", None, "rewards and methods get all columns of a row", "hf"),
    Row("truncation_strategy", None, _WHOLE, "swift"),
    Row("truncation", None, _WHOLE, "verl"),
    Row("filter_overlong_prompts", None, _WHOLE, "verl"),
    Row("train_on_inputs", None, "responses alone are trained on, never a prompt", "axolotl"),
    Row("train_max_samples", "data.limit", "", "verl"),
    Row("prompt_key", "data.columns", ": {prompt: COLUMN}", "verl"),
    Row("dataset_text_field", "data.columns", ": {prompt: COLUMN}", "trl"),
    Row("assistant_only_loss", "data.assistant_turns", ": all", "trl"),
    Row("roles_to_train", "data.assistant_turns", ": all trains the assistant's turns", "axolotl"),
    Row("default_system_message", "data.system", "", "axolotl"),
    Row("packing", None, _PACKED, "trl swift"),
    Row("sample_packing", None, _PACKED, "axolotl"),
    Row("pad_to_sequence_len", None, _PACKED, "axolotl"),
    Row("use_remove_padding", None, _PACKED, "verl"),
    Row("padding_free", None, _PACKED, "trl swift"),
    Row("custom_reward_function", "reward.name", ", e.g. my_package.mine:function", "verl"),
    Row("reward_funcs", "reward.name", ", e.g. exact or my_package.mine:function", "trl swift axolotl"),
    Row(
        "reward_weights",
        None,
        "a function of your own adds rewards: `reward.name` my_package.mine:function",
        "trl swift axolotl",
    ),
)

BY_NAME = {row.name: row for row in ROWS}
OTHER_NAMES = {row.name: row.says for row in ROWS}


def renamed(values: Any, section: str) -> Any:
    """The values of a section with accepted names of other trainers replaced by the keys here; others unchanged.

    Raises ValueError for a setting that is given under two names.
    """
    known: Mapping[str, str] = ACCEPTED.get(section, {})
    if not isinstance(values, dict) or not known.keys() & values.keys():
        return values
    out: dict[Any, Any] = {}
    for name, value in values.items():
        key = known.get(name, name)
        if key in out:
            known_as = next(other for other in values if other != key and known.get(other) == key)
            raise ValueError(f"`{key}` is given under two names, one of them `{known_as}`: give it once")
        out[key] = value
    return out


def markdown() -> str:
    """The text of docs/coming_from.md."""
    lines = [
        "# Coming from TRL, ms-swift, axolotl or verl",
        "",
        "Generated from `src/opd/recipe/other_names.py` by `make docs`. A recipe that has one of these names is",
        "refused with the same words, and with the line; the names in the first table are accepted.",
        "",
        "Each name was read in the files of its library:",
        "",
        *(f"- {version}: {where}" for version, where in LIBRARIES.values()),
        "",
        "## Accepted",
        "",
        "These mean what the key here means, whatever the value.",
        "",
        "| section | name | key here | of |",
        "|---|---|---|---|",
    ]
    for section, names in ACCEPTED.items():
        for name, key in names.items():
            lines.append(f"| `{SECTIONS[section]}` | `{name}` | `{key}` | {_of(BY_NAME[name])} |")
    lines.append("| the recipe | `report_to: wandb`, a text | `report_to: [wandb]`; none: `[]` | transformers |")
    lines += [
        "",
        "A reward in TRL's form, `f(completions, **kwargs)` or `f(prompts, completions, **kwargs)`, which returns a",
        "number for each completion, is accepted in `reward.name` and in `opd.distill(reward=f)`. It is known by its",
        "parameter `completions`, and called with lists of one: `prompts`, `completions` (messages of a conversation),",
        "the row's columns by name, and the reward's `options`. `opd check` refuses rows without a column that it",
        "requires, a coroutine, and a function that requires what only TRL's trainers give (`completion_ids`,",
        "`trainer_state`). More about rewards: [rewards.md](rewards.md).",
        "",
        "## Key by key",
        "",
        "NAME is the name of a model in `models`. Keys without a section are of a stage, unless the row says of the",
        "recipe.",
        "",
        "| name | here | of |",
        "|---|---|---|",
    ]
    lines += [f"| `{row.name}` | {_here(row)} | {_of(row)} |" for row in ROWS if row.of]
    return "\n".join(lines) + "\n"


SECTIONS = {
    "Lora": "models.NAME.lora",
    "SamplingSection": "sampling",
    "OptimizerSection": "optimizer",
    "ModelSpec": "models.NAME",
}


def _here(row: Row) -> str:
    return f"none: {row.note}" if row.key is None else f"`{row.key}`{row.note}"


def _of(row: Row) -> str:
    return ", ".join(LIBRARIES[one][0].split()[0] for one in row.libraries) or "-"


if __name__ == "__main__":
    print(markdown(), end="")
