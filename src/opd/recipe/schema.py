"""The schema of a recipe, the YAML description of a run; validated before heavy imports. No torch here.

Field names follow TRL where the meaning is the same. `key=value` overrides use dotted paths; a stage is given by name
or number: `stages.distil.steps=5`. In a recipe of one stage `steps=5` is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictBool, model_validator

from opd.files import expanded
from opd.recipe.environment import EnvironmentSection
from opd.recipe.numbers import Float, Int
from opd.recipe.section import Name, Section, SettingName, Text
from opd.recipe.templates import template_text
from opd.types import teachers_in


def _named(modules: str | list[str]) -> str | list[str]:
    if not modules or (isinstance(modules, list) and "" in modules):
        raise ValueError("it names no module: give a list of names, or all-linear")
    return modules


class Lora(Section):
    rank: Int = Field(default=16, ge=1, le=8192)  # of the two factors
    alpha: Float = Field(default=32.0, gt=0)  # the product of the factors is scaled by alpha / rank
    # Of the adapted layers: names, or one regular expression.
    target_modules: Annotated[str | list[str], AfterValidator(_named)] = "all-linear"


class Characters(Section):
    """A tokenizer with one token per character, and one per pair in `merges`, which joins that pair everywhere."""

    characters: Text  # each is a token
    merges: list[tuple[str, str]] = []  # in order of application
    words: list[Text] = []  # longer texts that are one token each, found before the characters; the longest first


class StartSection(Section):
    """A vLLM server on this machine that the run starts with the stage and stops with it: see docs/served.md."""

    path: Text | None = None  # of a teacher: a folder, a hub id, a GGUF file or package:NAME/FILE
    dtype: Literal["float32", "bfloat16"] = "float32"  # of a teacher; an engine has the student's
    python: Text | None = None  # an interpreter that has vLLM; default: OPD_VLLM's, else the running one
    flags: list[Text] = []  # more flags of the server; they replace those that opd gives
    env: dict[str, str] = {}  # more environment variables of the server, e.g. CUDA_VISIBLE_DEVICES
    patience_s: Float = Field(default=900.0, gt=0)  # how long the start may take


class Servers(Section):
    """vLLM servers: by address, or one that the run starts."""

    urls: list[Text] = []  # http://host:port of each server; a response is scored or written by one of them
    start: StartSection | None = None  # in place of `urls`: a server on this machine
    model: Text | None = None  # the servers' name of the model; default: the only one that they have
    api_key_env: str | None = None  # environment variable with the key; the recipe never holds the key

    @model_validator(mode="after")
    def _urls_or_start(self) -> Servers:
        if bool(self.urls) == (self.start is not None):
            raise ValueError("give either the addresses of servers that run (`urls`), or `start` to start one")
        unread = [name for name in ("model", "api_key_env") if getattr(self, name) is not None]
        if self.start is not None and unread:
            raise ValueError(f"`start` does not read {', '.join(f'`{name}`' for name in unread)}: leave it out")
        return self


class ServerSection(Servers):
    """A teacher on vLLM servers, all of one model. Its token ids have to be the student's: see docs/served.md."""

    tokens_in_flight: Int = Field(default=65_536, ge=1)  # per server, which queues without a limit of its own
    timeout_s: Float = Field(default=300.0, gt=0)  # per request
    patience_s: Float = Field(default=300.0, ge=0)  # how long to wait while no server answers, or while one is busy
    retries: Int = Field(default=2, ge=0)  # of a request that a server answers with a failure
    max_failed: Float = Field(default=0.1, ge=0, le=1)  # largest share of a step's responses without scores

    @model_validator(mode="after")
    def _path_of_teacher(self) -> ServerSection:
        if self.start is not None and self.start.path is None:
            raise ValueError("`start` of a teacher needs the `path` of its model")
        return self


class EngineSection(Servers):
    """vLLM servers that write the student's responses in training. They get its weights before every step.

    Those at `urls` run with VLLM_SERVER_DEV_MODE=1, `--worker-extension-cls opd.engines.worker.WeightLoader`,
    `--enable-scale-out` and `--logprobs-mode processed_logprobs`; for `lora` and `transfer` otherwise: docs/served.md.
    """

    folder: Text | None = None  # that trainer and servers share, for weights; default: in the run's folder
    # What is sent: the whole model, by the folder or (transfer) from GPU to GPU; or its LoRA adapter.
    weights: Literal["full", "lora", "transfer"] = "full"
    tolerance: Float = Field(default=1e-3, gt=0)  # nats: largest difference of a log-prob after an update
    sleep: StrictBool = False  # the servers free their memory while nothing is drawn, for a trainer on the same GPU
    public: StrictBool = False  # allow an address that is neither of this machine nor of a private network
    tokens_in_flight: Int = Field(default=65_536, ge=1)  # per server, which queues without a limit of its own
    timeout_s: Float = Field(default=600.0, gt=0)  # per request
    patience_s: Float = Field(default=300.0, ge=0)  # how long to wait while no server answers, or while one is busy
    retries: Int = Field(default=2, ge=0)  # of a request that a server answers with a failure

    @model_validator(mode="after")
    def _path_of_student(self) -> EngineSection:
        if self.start is not None and (self.start.path is not None or self.start.dtype != "float32"):
            raise ValueError("`start` of an engine serves the student as it is: leave `path` and `dtype` out")
        if self.weights == "lora" and (self.start is not None or self.sleep):
            raise ValueError("`weights: lora` needs servers of the base that you start: leave `start` and `sleep` out")
        return self


class ImportanceSection(Section):
    """Importance weights p / mu of a policy gradient whose responses other weights, or a truncation, have drawn."""

    level: Literal["token", "sequence"] = "token"  # of the token, or the product over the response
    cap: Float = Field(default=2.0, ge=1)  # the largest weight


# The fields of a model section that a model without weights in this process uses.
READ_BY_OTHERS = {
    "scorer": ("scorer", "options"),
    "server": ("server", "tokenizer", "chat_template", "template_options"),
}


def _unread_by(origin: str) -> tuple[str, ...]:
    """The fields of a model section that a model of this origin does not use."""
    if origin in READ_BY_OTHERS:
        return tuple(name for name in ModelSpec.model_fields if name not in READ_BY_OTHERS[origin])
    return ("options", "quantization") if origin == "init" else ("options", "tokenizer", "image_processor", "seed")


OF_TEMPLATE = ("chat_template", "template_options")
ORIGINS = ("path", "init", "from_stage", "scorer", "server")


class Quantization(Section):
    """Weights of 4 bits by bitsandbytes, in all linear layers but the output layer (QLoRA)."""

    bits: Literal[4] = 4  # of a weight
    type: Literal["nf4", "fp4"] = "nf4"  # the 16 values that a weight can have
    double: bool = True  # the scales are quantised too


class ModelSpec(Section):
    """The origin of a model: a path, a config for random weights, an earlier stage, or a function."""

    path: Text | None = None  # folder or hub id of a model or an adapter, GGUF file, or package:NAME/FILE
    init: dict[str, Any] | None = None  # a transformers config with model_type: random weights
    from_stage: str | None = None  # the model that this stage trained
    scorer: str | None = None  # your own teacher, my_module:MyTeacher, called (student, **options)
    server: ServerSection | None = None  # a teacher on vLLM servers
    options: dict[str, Any] = {}  # of `scorer`
    image_processor: dict[str, Any] = {}  # of an `init` that reads images: image_mean, image_std, resample, ...
    tokenizer: str | Characters | None = None  # for `init`; for `server`, a folder or hub id (default: the student's)
    seed: Int | None = Field(default=None, ge=0)  # of `init`; default: from the recipe's seed and the model's name
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    autocast: bool = False  # bfloat16 compute over float32 weights
    device: Text | None = None  # default: cuda if there is one
    offload: bool = False  # a teacher that stays on the CPU while unused
    lora: Lora | None = None  # train a low-rank adapter in place of the weights
    quantization: Quantization | None = None  # {} for nf4; a student needs `lora` too
    gradient_checkpointing: bool = False  # less memory: activations are computed again in the backward pass
    attn_implementation: str | None = None  # of transformers: sdpa, eager, flash_attention_2, ...
    trust_remote_code: bool = False  # run Python code that comes with the model
    # Replaces the tokenizer's: jinja, or a file of it, which is read when the recipe is.
    chat_template: Annotated[str, AfterValidator(template_text)] | None = None
    template_options: dict[str, Any] = {}  # e.g. {enable_thinking: false}; default with `from_stage`: those there

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        given = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a model comes from exactly one of {', '.join(ORIGINS)}; got {given or 'none'}")
        fields = type(self).model_fields
        if unread := [name for name in _unread_by(given[0]) if getattr(self, name) != fields[name].default]:
            raise ValueError(f"`{given[0]}` does not read {', '.join(f'`{name}`' for name in unread)}: leave it out")
        if self.server is not None and isinstance(self.tokenizer, Characters):
            raise ValueError("`tokenizer` of a `server` is a folder or a hub id; without one it is the student's")
        if self.quantization is not None and self.offload:
            raise ValueError(
                "`offload` moves whole weights, and those of `quantization` stay on their device: choose one"
            )
        return self

    @property
    def local(self) -> bool:
        """Whether the model's weights are loaded in this process."""
        return self.scorer is None and self.server is None


class SelectSection(Section):
    """Which rows to keep. Questions are compared as in the data, without template and system message.

    `opd.data.selection` has the defaults of `threshold` and `n`, and checks fields against each other.
    """

    by: DataSection | None = None  # another data set, e.g. the prompts that the teacher was trained on
    keep: Literal["near", "far"] | None = None  # of `by`
    distinct: bool = False  # leave out questions similar to an earlier one
    measure: Literal["exact", "words", "characters", "encoder"] = "exact"  # of similarity
    threshold: Float | None = Field(default=None, gt=0, le=1)  # least cosine of two similar ones; equal ones always are
    n: Int | None = Field(default=None, ge=1)  # of the n-grams of words or characters
    encoder: str | None = None  # folder or hub id of a text encoder
    limit: Int | None = Field(default=None, ge=1)  # keep the first of the remaining rows


class UpsampleSection(Section):
    """Rows that occur several times: those whose `column`, a share such as a pass rate, is within bounds.

    The offline balance of arXiv 2605.03677: prompts that the student sometimes answers correctly. No row is left out.
    """

    column: Text = "pass_rate"  # a number from 0 to 1 in every row
    above: Float = Field(default=0.0, ge=-1, le=1)  # the share is larger than this; -1: also 0
    below: Float = Field(default=1.0, ge=0, le=2)  # the share is smaller than this; 2: also 1
    times: Int = Field(default=2, ge=2)  # occurrences of such a row


class DataSection(Section):
    """The source of prompts. `path` is one of

    - a file that ends with .json (a list of objects, or an object per line), .jsonl, .csv, .tsv (an empty cell is a
      missing value), the same with .gz, or .parquet
    - `package:NAME/FILE`, such a file inside an installed package, which is not imported
    - `reasoning_gym:TASK`, rows of `create_dataset(TASK, **options)`; `seed` defaults to 0, the number of rows to
      `skip` + `limit` or 500, which changes no row: see `opd.data.gym.gym_rows`
    - `package.module:function`, rows of `function(**options)`, an iterable of dicts
    - a folder of such files, in the splits and the order of `datasets`, with `options` such as `name` or `data_files`
    - another folder or a hub name: `datasets.load_from_disk(path)`, or `load_dataset(path, split=split, **options)`.
      Values then have the types of Arrow: in JSON "2024-01-05" becomes a datetime, and 3 beside 3.5 becomes 3.0
    """

    path: str  # a file, package:NAME/FILE, reasoning_gym:TASK, package.module:function, a folder, or a hub name
    split: str = "train"  # of a folder or a hub name
    columns: dict[str, str] = {}  # opd's name -> the file's column
    options: dict[str, Any] = {}  # of the function, the task of reasoning_gym, or `datasets.load_dataset`
    skip: Int = Field(default=0, ge=0)  # rows to leave out at the start, e.g. those of an earlier stage
    limit: Int | None = Field(default=None, ge=1)  # number of rows after `skip`
    chat: bool = False  # a text prompt becomes one user message
    system: str | None = None  # a system message before the messages; implies chat
    # A conversation's last message, if it is the assistant's, leaves the prompt: it becomes the row's `response`, the
    # beginning of the answer, which the model continues, or nothing.
    last_assistant: Literal["response", "continue", "drop"] = "response"
    # Which of a conversation's assistant turns are its response: with `all` the prompt ends before the first, and what
    # others say between them is read and not trained; with `each` every turn is the response of a prompt of its own. A
    # `response` may then be a list of messages, or of texts in turn.
    assistant_turns: Literal["last", "all", "each"] = "last"
    template: str | None = None  # rewrites the text, or the last user message; {prompt} is the original
    select: SelectSection | None = None  # which of these rows to keep
    upsample: UpsampleSection | None = None  # which of the kept rows occur several times


SelectSection.model_rebuild()  # the two sections refer to each other


def _overflows(temperature: float) -> float:
    if 0 < temperature < 1e-6:
        raise ValueError("divided by less than 1e-6, logits overflow: give 0 for the most likely token")
    return temperature


class SamplingSection(Section):
    """See `opd.types.Sampling`; n is the number of responses per prompt."""

    max_completion_length: Int = Field(default=256, ge=1)  # tokens of a response; a longer one is cut
    temperature: Annotated[Float, Field(ge=0), AfterValidator(_overflows)] = 1.0  # 0: the most likely token
    top_p: Float = Field(default=1.0, gt=0, le=1)  # sample from the most likely tokens with this mass; 1: all
    top_k: Int = Field(default=0, ge=0)  # sample from the k most likely tokens; 0: all
    n: Int = Field(default=1, ge=1)  # responses per prompt
    stop: list[Text] = []  # texts that end a response


OF_A_SERVER = ("model", "api_key_env", "body", "timeout_s", "patience_s", "concurrency")


class JudgeSection(Section):
    """An LLM judge, which answers a text with a text. Give exactly one of `url`, `lm` and `function`."""

    url: str | None = None  # of a server that speaks OpenAI's protocol, e.g. http://localhost:8000/v1
    model: str | None = None  # the server's name of the model
    api_key_env: str | None = None  # environment variable with the key; the recipe never holds the key
    body: dict[str, Any] = {}  # more fields of a request; null removes one of opd's
    timeout_s: Float = Field(default=300.0, gt=0)  # per request
    patience_s: Float = Field(default=300.0, ge=0)  # per question: how long to wait while the server is busy
    concurrency: Int = Field(default=8, ge=1)  # parallel requests
    lm: str | None = None  # one of the recipe's models, in this process
    function: str | None = None  # my_package.mine:function, called (question, **options); see `asked.protocol.Question`
    options: dict[str, Any] = {}  # of the function
    max_tokens: Int = Field(default=4096, ge=1)  # per answer; not passed to a function
    retries: Int = Field(default=2, ge=0)  # after a failed request, and as many after an unreadable answer

    @model_validator(mode="after")
    def _one_kind(self) -> JudgeSection:
        given = [name for name in ("url", "lm", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a judge has exactly one of url, lm, function; got {given or 'none'}")
        fields = type(self).model_fields
        names = [*([] if self.url else OF_A_SERVER), *([] if self.function else ["options"])]
        unread = [name for name in names if getattr(self, name) != fields[name].default]
        if unread:
            raise ValueError(f"`{given[0]}` does not read {', '.join(unread)}: leave it out")
        if self.url and not self.model:
            raise ValueError("`url` needs the server's name of the model: set `model`")
        return self


class Asks(BaseModel):
    """The judges of a reward, by role."""

    judge: JudgeSection | None = None  # writes the rubric
    verifier: JudgeSection | None = None  # applies it; default: the judge
    author: JudgeSection | None = None  # writes the teacher's answers; default: the data

    @property
    def asks(self) -> dict[str, JudgeSection]:
        """The judges that are configured, by role."""
        given = {"judge": self.judge, "verifier": self.verifier, "author": self.author}
        return {role: section for role, section in given.items() if section is not None}


MAX_FAILED = 0.1  # ours; arXiv 2605.07396 allows LLM judges 0.4, see the reward `rubric`


class RewardSection(Section, Asks):
    """A reward with its options, its judges if it uses any, and what a failed call of a function means."""

    # exact, regex, final_number, max_words, math_verify, reasoning_gym, rubric, feedback, or my_package.mine:function
    name: str
    options: dict[str, Any] = {}  # of the reward
    on_error: Literal["stop", "drop"] = "stop"  # drop: the response has no reward, and is counted
    max_failed: Float = Field(default=MAX_FAILED, ge=0, le=1)  # with `drop`: largest share of a step's groups
    timeout_s: Float | None = Field(default=None, gt=0)  # seconds per response; None: no limit


Beta: TypeAlias = Annotated[Float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """The optimiser and its settings. Gradients are clipped to `max_grad_norm` (global norm)."""

    # muon: matrices inside the layers; AdamW with the same learning rate has the rest.
    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    learning_rate: Float = Field(default=1e-6, gt=0)  # after the warm-up
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # decay of the moving averages of the gradient and of its square
    eps: Float = Field(default=1e-8, gt=0)  # added to the root of the average square
    weight_decay: Float = Field(default=0.0, ge=0)  # decoupled from the gradient
    momentum: Beta = 0.95  # of muon
    max_grad_norm: Float = Field(default=1.0, gt=0, allow_inf_nan=True)  # .inf: no clipping
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate after the warm-up
    warmup_steps: Int = Field(default=0, ge=0)  # steps in which the learning rate rises from zero

    @model_validator(mode="after")
    def _momentum_of_muon(self) -> OptimizerSection:
        if self.name != "muon" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(f"`momentum` is of `name: muon`, and {self.name} does not read it: it has `betas`")
        return self


class EvaluateSection(Section):
    """An evaluation on held-out prompts: before and after training, and every `every` steps (0: never in between)."""

    data: DataSection  # the held-out prompts
    reward: RewardSection | None = None  # default: the stage's, if it has one
    # settings by name; each is measured
    sampling: dict[SettingName, SamplingSection] = Field(default={"sampled": SamplingSection()}, min_length=1)
    every: Int = Field(default=0, ge=0)  # steps between evaluations; 0: before and after training only
    before: bool = True  # evaluate before training too
    teacher: bool = False  # also measure the teacher's own responses, once
    kl: bool = False  # exact reverse and forward KL on the student's own responses
    pass_at: list[Int] = [1]  # k of pass@k; each needs as many responses per prompt
    # By setting, a mean reward, or numbers by metric, {sampled: {environment/won: 0.5}}. The stage ends with the first
    # evaluation after a step in which all are at least as large.
    until: dict[SettingName, Float | Annotated[dict[str, Float], Field(min_length=1)]] = {}


class DiagnosticsSection(Section):
    """Diagnostics of a stage's own responses: see docs/diagnostics.md."""

    every: Int = Field(default=0, ge=0)  # steps between full comparisons of student and teacher; 0: none
    k: Int = Field(default=16, ge=1)  # number of most likely tokens of each model to compare
    bucket: Int = Field(default=64, ge=1)  # tokens per bucket of positions; doubled until 16 buckets suffice


class SamplesSection(Section):
    """What sample files and held-out files hold besides the responses: see docs/run_folder.md."""

    rows: Int = Field(default=5, ge=0)  # responses of a sample file with both models' entropies and likely tokens
    top_k: Int = Field(default=5, ge=0)  # of each model at each token of such a row
    follow: Int = Field(default=2, ge=0)  # held-out prompts that every sample file has a greedy response to
    # Responses of a setting of an evaluation that both models score for the file; `evaluate.kl` gives 64 of the setting
    # that it reads, unless this is 0.
    held_out: Int = Field(default=4, ge=0)
    images: Int = Field(default=64, ge=0)  # different images of a file of which small copies are kept


class CheckpointSection(Section):
    every: Int = Field(default=50, ge=1)  # steps
    # Since the last one, after the step that passes them; .inf: never.
    every_minutes: Float = Field(default=10.0, gt=0, allow_inf_nan=True)
    keep: Int = Field(default=2, ge=1)  # the number of checkpoints kept


class TaskSection(Section):
    """One task of a stage: prompts, teacher, reward, sampling and evaluation.

    Missing fields of `sampling`, `teacher_sampling` and `evaluate` are taken from the stage.
    """

    data: DataSection  # the prompts
    environment: EnvironmentSection | None = None  # the student talks with it: tools, a game
    teacher: str | None = None  # several, which all score each row: one+other
    reward: RewardSection | None = None  # of the student's responses
    sampling: SamplingSection = SamplingSection()  # of the student's responses
    teacher_sampling: SamplingSection | None = None  # of the teacher's responses; default: `sampling`
    evaluate: EvaluateSection | None = None  # on held-out prompts of this task
    share: Float = Field(default=1.0, gt=0)  # of the steps or prompts, relative to other tasks
    train: str | None = None  # in a stage with `peers`, the model whose own data this is


# Also of a stage without tasks.
TASK_FIELDS = ("data", "environment", "teacher", "reward", "sampling", "teacher_sampling", "evaluate")


class StageSpec(Section):
    """One stage: model, method and data. Either `data`, `teacher` and `reward`, or `tasks` with their own.

    With `peers` the stage trains several models at once, and saves their mean. Each has its own tasks; those of a peer
    that teaches it are its tasks too, with that peer as their teacher (`as_seen_by`).
    """

    name: Name  # also of its folder in the run's
    train: str  # the model that is trained, one of `models`
    teacher: str | None = None  # one of `models`, `train` included; several, which all score each row: one+other
    base: str | None = None  # a fixed third model; `train` with LoRA: its weights without the adapter
    method: str  # a name that `opd methods` lists, several as one+other, or my_package.mine:method
    options: dict[str, Any] = {}  # of the method: `opd describe METHOD`
    data: DataSection | None  # the prompts; null: the stage has tasks
    tasks: dict[Name, TaskSection] = {}  # by name, in place of `data`, `environment`, `teacher`, `reward`
    task_order: Literal["alternate", "mixed"] = "alternate"  # a step has prompts of one task, or of all
    peers: list[str] = []  # other models that this stage trains beside `train`
    topology: Literal["all", "hub", "none"] = "all"  # all: all teach each other; hub: `train` and each peer do
    environment: EnvironmentSection | None = None  # the student talks with it: tools, a game
    reward: RewardSection | None = None  # of the student's responses
    sampling: SamplingSection = SamplingSection()  # of the student's responses
    sampler: str | None = None  # your own for training, my_module:MySampler, called (student, sampling, **options)
    sampler_options: dict[str, Any] = {}  # of `sampler`
    engine: EngineSection | None = None  # servers that write the student's responses in training
    ahead: Literal[0, 1] = 0  # steps by which the engine writes responses before the step that trains on them
    importance: ImportanceSection | None = None  # weights of a policy gradient
    teacher_sampling: SamplingSection | None = None  # for responses of the teacher; default: `sampling`
    apart_from: list[Name] = []  # earlier stages with which this one shares no prompt, e.g. to hold labels out
    steps: Int = Field(ge=1)  # updates of the weights
    seconds_of: str | None = None  # stop after as many seconds of training as that stage took
    prompts_per_step: Int = Field(default=16, ge=1)  # of all processes; each has `sampling.n` responses
    micro_batch_tokens: Int = Field(default=4096, ge=1)  # tokens in memory at once; changes no result
    max_prompt_length: Int | None = Field(default=None, ge=1)  # tokens; a longer prompt is an error
    optimizer: OptimizerSection = OptimizerSection()  # AdamW, or another by its `name`
    # The factor of the load-balancing loss of a mixture of experts; true: the router_aux_loss_coef of its config.
    router_aux_loss: StrictBool | Annotated[Float, Field(ge=0)] = Field(default=False, union_mode="left_to_right")
    evaluate: EvaluateSection | None = None  # on held-out prompts
    # comparisons of student and teacher on the stage's own responses
    diagnostics: DiagnosticsSection = DiagnosticsSection()
    checkpoint: CheckpointSection = CheckpointSection()  # from which a stopped run goes on
    samples_every: Int = Field(default=10, ge=0)  # steps between sample files; 0: none
    samples: SamplesSection = SamplesSection()  # what these files hold besides the responses
    save: Literal["merged", "adapter", "both"] = "merged"  # the whole model, its LoRA adapter in PEFT's format, or both
    save_dtype: Literal["origin", "float32", "bfloat16", "float16"] = "origin"  # of the whole model's weights

    @property
    def by_task(self) -> dict[str | None, TaskSection]:
        """The tasks by name. A stage without tasks has a single task, named None."""
        if self.data is None:
            return {**self.tasks}
        return {None: TaskSection(**{name: getattr(self, name) for name in TASK_FIELDS})}

    def only(self, task: str) -> StageSpec:
        """The stage reduced to one task, as a stage without tasks."""
        return self.model_copy(update={name: getattr(self.tasks[task], name) for name in TASK_FIELDS} | {"tasks": {}})

    @property
    def has_goal(self) -> bool:
        """Whether an evaluation may end the stage: `evaluate.until`."""
        return any(task.evaluate and task.evaluate.until for task in self.by_task.values())

    @property
    def trains(self) -> list[str]:
        """The models that this stage trains; one, unless it has peers."""
        return [self.train, *self.peers]

    @property
    def views(self) -> list[StageSpec]:
        """The stage as each of its models sees it; without peers, the stage itself."""
        return [self.as_seen_by(name) for name in self.trains] if self.peers else [self]

    def as_seen_by(self, name: str) -> StageSpec:
        """The stage of one of several models: its own tasks, and those of the peers that teach it.

        On its own tasks a model has no peer to be compared with in an evaluation.
        """
        own: dict[str, TaskSection] = {}
        theirs: dict[str, TaskSection] = {}
        for key, task in self.tasks.items():
            if task.train == name:
                alone = {} if task.teacher or task.evaluate is None else {"kl": False, "teacher": False}
                evaluate = task.evaluate and task.evaluate.model_copy(update=alone)
                own[key] = task.model_copy(update={"evaluate": evaluate})
            elif task.train is not None and self._teaches(task.train, name):
                theirs[key] = task.model_copy(update={"teacher": task.train})
        return self.model_copy(update={"train": name, "tasks": own | theirs})

    def _teaches(self, teacher: str, student: str) -> bool:
        return self.topology == "all" or (self.topology == "hub" and self.train in (teacher, student))

    @property
    def teachers(self) -> list[str]:
        """The models that teach in this stage, without the student itself."""
        named = [name for task in self.by_task.values() for name in teachers_in(task.teacher)]
        return [name for name in dict.fromkeys(named) if name != self.train]

    @property
    def scoring(self) -> list[str]:
        """The models besides the student that score its responses: the teachers, then the base."""
        others = [] if self.base in (None, self.train) else [str(self.base)]
        return list(dict.fromkeys([*self.teachers, *others]))

    @property
    def models(self) -> list[str]:
        """All models of the stage: those that it trains, those that score, those that judge."""
        return list(dict.fromkeys([*self.trains, *self.scoring, *self.judge_models]))

    @property
    def judge_models(self) -> list[str]:
        """The models of the recipe that judge for the stage's rewards."""
        judges = [judge for task in self.by_task.values() if task.reward for judge in task.reward.asks.values()]
        return list(dict.fromkeys(judge.lm for judge in judges if judge.lm is not None))

    def where(self, task: str | None) -> str:
        """The start of a message: the stage, and the task if given."""
        return f"Stage {self.name!r}" + ("" if task is None else f", task {task!r}")


def _trackers(value: Any) -> Any:
    """TRL's form too: one name, where "none" stands for none."""
    if isinstance(value, str):
        return [] if value == "none" else [value]
    return value


Trackers: TypeAlias = Annotated[list[str], BeforeValidator(_trackers, json_schema_input_type=str | list[str])]


class Recipe(Section):
    name: Name  # of the run, and of its folder in runs/
    description: str = ""  # one line, as `opd recipes` lists it
    seed: Int = Field(default=0, ge=0)  # of new weights, the order of prompts and the sampling
    output_dir: Text | None = None  # default: runs/NAME
    models: dict[str, ModelSpec]  # by name
    stages: list[StageSpec] = Field(min_length=1)  # trained one after the other
    report_to: Trackers = []  # wandb, trackio, tensorboard
    report_to_samples: Int = Field(default=8, ge=0)  # responses of a sample file that they get as a table

    @property
    def folder(self) -> Path:
        """The run's folder, with a home folder in place of `~`."""
        return expanded(self.output_dir or f"runs/{self.name}")

    def stage(self, name: str) -> StageSpec:
        return next(stage for stage in self.stages if stage.name == name)


def origin_name(recipe: Recipe, name: str) -> str:
    """The name of the original model of `name`: follows `from_stage` back to a model without one."""
    while (stage := recipe.models[name].from_stage) is not None:
        name = recipe.stage(stage).train
    return name


def origin_of(recipe: Recipe, name: str) -> ModelSpec:
    """The original model of `name`, with the chat template and the options of `section_of`."""
    origin = recipe.models[origin_name(recipe, name)]
    if recipe.models[name].from_stage is None:
        return origin
    own = section_of(recipe, name)
    return origin.model_copy(update={key: getattr(own, key) for key in OF_TEMPLATE})


def section_of(recipe: Recipe, name: str) -> ModelSpec:
    """A model's section. One `from_stage` has the chat template and options of the model there, unless its own."""
    spec = recipe.models[name]
    if spec.from_stage is None:
        return spec
    before = section_of(recipe, recipe.stage(spec.from_stage).train)
    own = {key: getattr(spec, key) for key in OF_TEMPLATE if key in spec.model_fields_set}
    if own.get("chat_template") is None:  # no template is no template of its own, but no options are
        own["chat_template"] = before.chat_template
    return spec.model_copy(update={"template_options": before.template_options, **own})
