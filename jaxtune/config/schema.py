"""Every key, with its type and default: HF TrainingArguments' names for the loop, PEFT's for `lora`, TRL's for objectives.

A default of None that depends on other keys (the learning rate, the eval interval, ...) is filled in by `checks.resolve`, so every `Config`
is resolved and valid. Only `dtype: auto` is settled later, when the device is known.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtune.config import checks
from jaxtune.config.adapters import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)
from jaxtune.config.coerce import Group
from jaxtune.config.policy import GROUPED, POLICY

Table = tuple[tuple[str, Any], ...]  # a dict for the user


@dataclass(frozen=True)
class Source(Group):
    """One data source: a file, glob, folder or hub id, with its settings. A bare string is its path."""

    group: ClassVar[str] = "source"
    shorthand: ClassVar[str | None] = "path"
    without: ClassVar[str] = "name a file, folder, glob or hub id (rows in memory go into a .jsonl file first)"

    path: str
    name: str | None = None  # the subset of a hub data set
    split: str | None = None
    weight: float | None = None  # its share of the mixture; None for all: every row once per epoch
    limit: int | None = None  # the largest number of its rows
    format: str | None = None
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DataConfig(Group):
    """Where the rows come from and how they become tokens."""

    group: ClassVar[str] = "data"

    train: tuple[Source, ...] = ()
    eval: float | tuple[Source, ...] | None = None  # a share of the training rows, or separate sources
    test: float | tuple[Source, ...] | None = None  # rows excluded from training and evaluation
    replay: Source | None = None  # general data, to prevent forgetting; its weight is its share of all rows, by default 0.1
    temperature: float | None = None  # shares of the sources: rows ** (1 / temperature)
    mix_stop: Literal["all", "first"] = "all"  # the epoch ends when every source, or the first one, is used up
    split_by: str | None = None  # the field whose equal values stay on one side of a split
    stratify: str | None = None  # the field each of whose values is split in the same shares
    split_seed: int = 0
    kfold: int | None = None  # evaluate on each k-th of the rows in turn: training runs every fold
    fold: int | None = None  # this one alone
    format: str | None = None  # detected by default
    columns: tuple[tuple[str, str], ...] = ()  # {our name: the file's name}
    max_length: int = 1024
    length_policy: Literal["error", "drop", "truncate", "split"] = "error"
    truncation_side: Literal["right", "left", "prompt"] = "right"  # prompt: from the left, but never into the answer
    packing: bool | Literal["group"] = True  # group: rows of similar length together, padded
    shared_prompts: bool = True  # answers to one prompt share its computation; false: each answer has its own prompt
    train_on: Literal["completion", "assistant", "last", "all"] = "completion"
    train_on_eos: bool = True
    add_eos: bool = True
    shuffle: bool = True
    system: str | None = None
    chat_template: str | None = None  # the path of a Jinja file; by default the tokenizer's own template
    eos_token: str | None = None  # the token that ends texts and answers; by default the tokenizer's own
    cache_dir: str | None = None
    streaming: bool = False  # for corpora larger than memory: hub rows are not downloaded first, and rows are not compared with each other
    quality: tuple[tuple[str, Literal["drop", "keep", "error"]], ...] = ()  # {problem: action}, in addition to data/quality.py's defaults


@dataclass(frozen=True)
class MeshConfig(Group):
    """Devices along each axis; one axis may be -1, meaning the rest."""

    group: ClassVar[str] = "mesh"

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1  # each row's tokens are split over that many devices


@dataclass(frozen=True)
class DistributedConfig(Group):
    """How this process finds the others of a run over several hosts (`jax.distributed.initialize`)."""

    group: ClassVar[str] = "distributed"

    initialize: bool | Literal["auto"] = "auto"  # auto: if keys are given, or if srun, mpirun or a TPU slice started several processes
    coordinator_address: str | None = None  # HOST:PORT of process 0; or JAX_COORDINATOR_ADDRESS
    num_processes: int | None = None  # or JAX_NUM_PROCESSES
    process_id: int | None = None  # or JAX_PROCESS_ID
    initialization_timeout: int = 300  # seconds to wait for the other processes at the start


@dataclass(frozen=True)
class EvalConfig(Group):
    """What to measure besides the loss, by generating answers to the prompts of the evaluation rows."""

    group: ClassVar[str] = "evaluate"

    metric: tuple[str, ...] = ()  # exact_match, or a function by its dotted path
    max_new_tokens: int = 128
    limit: int | None = None  # of the evaluation rows
    prompts: tuple[str, ...] = ()  # samples to show, besides those of the evaluation rows


def _of(*objectives: str, default: Any = None) -> Any:
    """A key of these objectives; setting it for another is an error."""
    return field(default=default, metadata={"objectives": objectives})


@dataclass(frozen=True)
class ObjectiveConfig(Group):
    """Keys of an objective, flat at the top level, with TRL's names and defaults."""

    # module.function or path/file.py:function, which is run in place of the objective's own loss (losses.py)
    loss_function: str | None = None
    loss_type: tuple[str, ...] | None = None  # None: the objective's own, for sft nll; several with loss_weights
    loss_weights: tuple[float, ...] | None = _of("dpo")
    beta: float | None = _of("dpo", "kto", "orpo", "cpo", "simpo", *GROUPED, "distill")
    label_smoothing: float = _of("dpo", "cpo", "simpo", default=0.0)
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = _of("dpo", default="reverse_kl")
    f_alpha_divergence_coef: float = _of("dpo", default=0.5)
    ld_alpha: float | None = _of("dpo")
    use_weighting: bool = _of("dpo", default=False)
    discopop_tau: float = _of("dpo", default=0.05)
    precompute_ref_log_probs: bool = _of("dpo", "kto", default=False)
    ref_model: str | None = _of("dpo", "kto", *POLICY)  # None: the base without the adapter, or the initial weights
    sync_ref_model: bool = _of("dpo", *POLICY, default=False)
    ref_model_mixup_alpha: float = _of("dpo", *POLICY, default=0.6)
    ref_model_sync_steps: int = _of("dpo", *POLICY, default=512)
    desirable_weight: float = _of("kto", default=1.0)
    undesirable_weight: float = _of("kto", default=1.0)
    cpo_alpha: float | None = _of("cpo", "simpo")
    simpo_gamma: float = _of("simpo", "cpo", default=0.5)
    center_rewards_coefficient: float | None = _of("reward")
    step_separator: str = _of("stepwise_reward", default="\n")  # follows each step; its last token is where a step is scored
    train_on_last_step_only: bool = _of("stepwise_reward", default=False)
    # stepwise_reward: tokens of all steps together, cut beyond that; grpo, rloo, ppo: tokens per answer, 512; distill: tokens per sampled
    # answer, 128
    max_completion_length: int | None = _of("stepwise_reward", *POLICY, "distill")
    num_labels: int | None = _of("classification")
    id2label: tuple[str, ...] | None = _of("classification")  # names of the classes in order; rows may use them as labels
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = _of("classification")
    router_aux_loss_coef: float | None = _of("sft", "distill")  # for mixtures of experts; None: config.json's own

    # ---- distill: a teacher's distribution is learnt ----
    teacher: str | None = _of("distill")  # whatever `model` takes
    teacher_quantization: Literal["nf4", "nf4-dq", "int8"] | None = _of("distill")
    lmbda: float = _of("distill", default=0.0)  # the share of steps that learn from answers sampled by the student
    seq_kd: bool = _of("distill", default=False)  # the other steps learn from answers sampled by the teacher, not from the rows' answers
    kd_ratio: float = _of("distill", default=1.0)  # the weight of the divergence; the rest is for the rows' own tokens

    # ---- grpo, rloo, ppo: answers are drawn, judged, and learnt from ----
    reward_funcs: tuple[str, ...] = _of(*POLICY, default=())  # of rewards.REWARDS, or module.function, path/file.py:function, which are run
    reward_model: tuple[str, ...] = _of(*POLICY, default=())  # folders (or hub ids) of reward models
    reward_weights: tuple[float, ...] | None = _of(*POLICY)  # of the functions, then of the models; None: all 1
    reward_column: str = _of(*POLICY, default="answer")  # what built-in rewards compare answers with
    reward_pattern: str | None = _of(*POLICY)  # for reward `format`: a regular expression that the whole answer must match
    num_generations: int = _of(*POLICY)  # answers per prompt; None: 8, rloo 2
    num_generations_eval: int = _of(*POLICY)  # None: num_generations
    temperature: float = _of("distill", *POLICY)  # None: 1, ppo 0.7
    top_p: float = _of(*POLICY, default=1.0)
    top_k: int = _of(*POLICY, default=0)
    min_p: float | None = _of(*POLICY)
    repetition_penalty: float = _of(*POLICY, default=1.0)
    steps_per_generation: int = _of(*GROUPED)  # micro-batches per rollout; None: gradient_accumulation_steps
    num_iterations: int = _of(*GROUPED, default=1)  # how many times each rollout is used
    epsilon: float = _of(*GROUPED, default=0.2)
    epsilon_high: float = _of(*GROUPED)  # None: epsilon
    delta: float | None = _of("grpo")
    importance_sampling_level: Literal["token", "sequence"] = _of("grpo", default="token")
    scale_rewards: bool | Literal["group", "batch", "none"] = _of("grpo", default="group")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = _of("grpo", default="sum_then_normalize")
    use_bias_correction_kl: bool = _of("grpo", default=True)
    top_entropy_quantile: float = _of("grpo", default=1.0)
    off_policy_mask_threshold: float | None = _of("grpo")
    sapo_temperature_pos: float = _of("grpo", default=1.0)
    sapo_temperature_neg: float = _of("grpo", default=1.05)
    vespo_k_pos: float = _of("grpo", default=2.0)
    vespo_lambda_pos: float = _of("grpo", default=3.0)
    vespo_k_neg: float = _of("grpo", default=3.0)
    vespo_lambda_neg: float = _of("grpo", default=2.0)
    normalize_advantages: bool = _of("rloo", default=False)
    reward_clip_range: tuple[float, ...] | None = _of("rloo")
    mask_truncated_completions: bool = _of(*GROUPED, default=False)
    log_completions: bool = _of(*POLICY, default=False)  # write prompts, answers and rewards to completions.jsonl

    # ---- ppo: a value head, and a reward for every token ----
    kl_coef: float = _of("ppo", default=0.05)
    kl_estimator: Literal["k1", "k3"] = _of("ppo", default="k1")
    whiten_rewards: bool = _of("ppo", default=False)
    missing_eos_penalty: float | None = _of("ppo")  # subtracted from the reward of a truncated answer
    gamma: float = _of("ppo", default=1.0)
    lam: float = _of("ppo", default=0.95)
    num_ppo_epochs: int = _of("ppo", default=4)  # how many times each rollout is used
    num_mini_batches: int = _of("ppo", default=1)  # steps that a rollout is split into, differently each time
    cliprange: float = _of("ppo", default=0.2)
    vf_coef: float = _of("ppo", default=0.1)
    cliprange_value: float = _of("ppo", default=0.2)


def _later() -> Any:
    """A default that depends on other keys; `checks.resolve` fills it in."""
    return field(default=None)


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    """One run, resolved and validated.

    Raises:
        ConfigError: a value of the wrong type, or an invalid combination of keys.
    """

    model: str = ""
    method: str = "lora"
    objective: str = "sft"
    output_dir: str | None = None
    resume: bool = False
    resume_allow_drift: bool = False  # resume even if keys or rows have changed; the changes are logged
    lora: LoraConfig = LoraConfig()
    ia3: IA3Config = IA3Config()  # a group per method, of which the run's own is used
    loha: LoHaConfig = LoHaConfig()
    lokr: LoKrConfig = LoKrConfig()
    vera: VeraConfig = VeraConfig()
    adalora: AdaLoraConfig = AdaLoraConfig()
    oft: OFTConfig = OFTConfig()
    boft: BOFTConfig = BOFTConfig()
    bitfit: BeftConfig = BeftConfig()
    ln_tuning: LNTuningConfig = LNTuningConfig()
    prompt_tuning: PromptTuningConfig = PromptTuningConfig()
    p_tuning: PromptEncoderConfig = PromptEncoderConfig()
    prefix_tuning: PrefixTuningConfig = PrefixTuningConfig()
    # full tuning: regexes over Hugging Face's tensor names; parameters without a match are frozen
    trainable_parameters: tuple[str, ...] = ()
    init_adapter: str | None = None  # a PEFT folder to start from, instead of a fresh adapter (its own config is used, not `lora`)
    quantization: Literal["nf4", "nf4-dq", "int8"] | None = None
    quantization_kernel: Literal["auto", "xla", "pallas"] = "auto"  # products with 4-bit matrices; auto: pallas on a TPU, else xla
    data: DataConfig = DataConfig()

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation; auto: bfloat16 on TPU and GPU, float32 on CPU
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in full tuning; adapters are float32
    max_steps: int = -1
    num_train_epochs: int | float = 3
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1

    learning_rate: float = _later()  # depends on method and objective
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "cosine_with_restarts", "constant",
        "constant_with_warmup", "polynomial", "inverse_sqrt", "warmup_stable_decay",
    ] = "linear"  # fmt: skip
    lr_scheduler_kwargs: Table = ()
    warmup_steps: int | float = 0  # below 1: a share of all steps
    optim: Literal["adamw", "adamw_8bit", "adafactor", "lion", "lion_8bit", "sgd", "muon"] = "adamw"
    optim_args: Table = ()
    optimizer_in_bwd: bool = False  # full tuning: update each layer as soon as its gradient is known, and then discard the gradient
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    # skip up to this many steps with a non-finite loss or gradient, with the state unchanged, before the run stops
    max_skipped_steps: int = 0
    loss_spike_sigma: float = 6.0  # report a loss this many standard deviations above the last hundred, with its rows; 0: never
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    neftune_noise_alpha: float | None = _of("sft")
    # true: full; auto: dots on a CPU, else full; model/stack.py says what each keeps
    gradient_checkpointing: bool | Literal["auto", "full", "dots", "offload", "groups"] = "auto"
    logits_chunk_size: int | None = None  # tokens whose logits exist at a time; None: 128 on a CPU, 512 elsewhere
    mlp_chunk_size: int | None = None  # tokens in the feed-forward part at a time, if it is recomputed; None: 1024, 4096 if packed
    # flash: a kernel for GPUs, splash: for TPUs; auto: the platform's kernel, if it is correct
    attention: Literal["auto", "xla", "flash", "splash"] = "auto"

    logging_steps: int | float = 10  # below 1, here and in the next key: a share of all steps
    eval_strategy: Literal["no", "steps", "epoch"] = _later()  # steps if eval_steps is given, epoch if there is evaluation data
    eval_steps: int | float | None = None
    eval_on_start: bool = False
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: int | float = 500
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool = _later()  # false for a loss
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    report_to: tuple[Literal["tensorboard"], ...] = ("tensorboard",)
    run_name: str | None = None
    evaluate: EvalConfig = EvalConfig()

    seed: int = 42
    data_seed: int = _later()  # seed
    mesh: MeshConfig = MeshConfig()
    zero_stage: Literal[0, 1] = 0  # 1: shard the optimiser state over mesh.data as well (ZeRO-1)
    distributed: DistributedConfig = DistributedConfig()
    compilation_cache: bool | str = True  # or the folder

    def __post_init__(self):
        super().__post_init__()
        for key, value in checks.resolve(self).items():
            object.__setattr__(self, key, value)
        checks.check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.yaml: the run's keys, then the keys of its objective; `load_config` gives an equal Config."""
        own = {field.name for field in dataclasses.fields(ObjectiveConfig)}
        plain = super().to_dict()
        of = {field.name: field.metadata.get("objectives", [self.objective]) for field in dataclasses.fields(self)}
        others = checks.GROUPS_OF_METHODS - {"lora", self.method}
        return {key: plain[key] for key in sorted(plain, key=lambda key: key in own) if self.objective in of[key] and key not in others}

    def replace(self, **changes: Any) -> "Config":
        """The same run with changed values, validated again."""
        return dataclasses.replace(self, **changes)
