"""Other spellings that are understood, and keys of torch tools that are done differently here.

`ALIASES` names the key an alias stands for; `TRANSLATE`, by alias or by key, turns a value of other tools into ours: by a
table (what it lacks is passed on, for the key's own check to judge) or by a function. Using an alias prints a one-line note.
"""

import ast
from collections.abc import Callable
from typing import Any

from jaxtune.errors import ConfigError

DEFAULT = object()  # the value asks for what is the default anyway

ALIASES: dict[str, str] = {
    alias: path
    for path, names in {
        "model": "base_model model_name_or_path model_name pretrained_model_name_or_path",
        "method": "finetuning_type adapter use_peft full_finetuning",
        "objective": "stage rl",
        "resume": "resume_from_checkpoint",
        "dtype": "torch_dtype bnb_4bit_compute_dtype compute_dtype bf16",
        "per_device_train_batch_size": "micro_batch_size batch_size train_batch_size per_gpu_train_batch_size",
        "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
        "gradient_accumulation_steps": "grad_accum gradient_accumulation",
        "num_train_epochs": "num_epochs epochs",
        "learning_rate": "lr",
        "lr_scheduler_type": "lr_scheduler scheduler",
        "warmup_steps": "warmup_ratio num_warmup_steps",
        "optim": "optimizer",
        "max_grad_norm": "gradient_clipping grad_clip",
        "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing activation_offloading",
        "attention": "attn_implementation",
        "eval_strategy": "evaluation_strategy",
        "logging_steps": "log_every_n_steps",
        "lora.r": "lora_r lora_rank",
        "lora.lora_alpha": "lora_alpha",
        "lora.lora_dropout": "lora_dropout",
        "lora.target_modules": "lora_target lora_target_modules lora_target_linear target_modules",
        "lora.use_rslora": "use_rslora peft_use_rslora",
        "lora.use_dora": "use_dora peft_use_dora",
        "lora.modules_to_save": "lora_modules_to_save additional_target modules_to_save",
        "lora.rank_pattern": "lora_rank_pattern",
        "lora.alpha_pattern": "lora_alpha_pattern",
        "lora.target_parameters": "lora_target_parameters",
        "lora.init_lora_weights": "peft_init_lora_weights init_lora_weights",
        "lora.trainable_token_indices": "peft_trainable_token_indices trainable_token_indices",
        "data.train": "dataset datasets train_file train_dataset dataset_name train_data",
        "data.eval": "val_set_size val_size validation_file eval_dataset eval_file test_datasets",
        "data.columns": "dataset_text_field",
        "data.max_length": "max_length max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size",
        "data.length_policy": "excess_length_strategy",
        "data.truncation_side": "truncation_mode",
        "data.packing": "packing sample_packing group_by_length train_sampling_strategy",
        "data.train_on": "train_on_inputs train_on_prompt mask_history completion_only_loss assistant_only_loss",
        "data.shuffle": "shuffle_dataset",
        "data.chat_template": "chat_template chat_template_path",
        "data.cache_dir": "dataset_prepared_path tokenized_path",
        "data.streaming": "streaming dataset_streaming",
        "id2label": "label2id",
        "reward_model": "reward_model_name_or_path reward_model_path",
    }.items()
    for alias in names.split()
}


def _warmup_ratio(value: Any) -> Any:
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(
            f"warmup_ratio is {value!r}, but has to be a share of all steps, from 0 to below 1; write warmup_steps for their number."
        )
    return value


def _resume(value: Any) -> Any:
    if isinstance(value, str) and value not in ("last", "latest", "auto"):
        raise ConfigError(
            f"resume_from_checkpoint is {value!r}, but a run resumes from its own newest checkpoint; write its output_dir and resume: true."
        )
    return bool(value)


def _target(value: Any) -> Any:
    """LLaMA-Factory's `all` and comma-separated names."""
    if value == "all":
        return "all-linear"
    return [name.strip() for name in value.split(",")] if isinstance(value, str) and "," in value else value


def _optim_args(value: Any) -> Any:
    """HF's `"momentum=0.9,nesterov=True"`; a table is passed on."""
    if not isinstance(value, str):
        return value
    try:
        return {name.strip(): ast.literal_eval(text.strip()) for name, text in (pair.split("=", 1) for pair in value.split(","))}
    except (ValueError, SyntaxError):
        raise ConfigError(f"optim_args is {value!r}; write optim_args: {{NAME: NUMBER}}.") from None


def _label_names(value: Any) -> Any:
    """HF's `{0: negative, 1: positive}` as names in order."""
    if not isinstance(value, dict):
        return value
    names = {str(number): name for number, name in value.items()}
    if sorted(names) != sorted(str(number) for number in range(len(names))):
        raise ConfigError(f"id2label is {value!r}, but has to number the classes 0, 1, 2, ...; write id2label: [negative, positive].")
    return [names[str(number)] for number in range(len(names))]


def _label_numbers(value: Any) -> Any:
    """HF's `{negative: 0, positive: 1}`, turned round."""
    return {number: name for name, number in value.items()} if isinstance(value, dict) else value


_AXOLOTL_TYPES = {"alpaca": "alpaca", "completion": "text", "chat_template": "messages", "sharegpt": "sharegpt"}


def _datasets(value: Any) -> Any:
    """Axolotl's list of {path, type, ...}: `type` is our `format`."""
    sources = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict) and "type" in entry:
            kind = entry["type"]
            if not isinstance(kind, str) or kind not in _AXOLOTL_TYPES:
                raise ConfigError(
                    f"the type of a data set is {kind!r}, but only {', '.join(_AXOLOTL_TYPES)} are understood; "
                    "write data.train with format and columns."
                )
            entry = {key: item for key, item in entry.items() if key != "type"} | {"format": _AXOLOTL_TYPES[kind]}
        sources.append(entry)
    return sources


TRANSLATE: dict[str, dict[Any, Any] | Callable[[Any], Any]] = {
    "adapter": {None: "full"},
    "use_peft": {True: "lora", False: "full"},
    "full_finetuning": {True: "full", False: DEFAULT},
    "bf16": {True: "bfloat16", False: DEFAULT, "auto": "auto"},
    "stage": {"pt": "sft", "rm": "reward"},
    "resume_from_checkpoint": _resume,
    "warmup_ratio": _warmup_ratio,
    "lora_target": _target,
    "lora_target_modules": _target,
    "lora_target_linear": {True: "all-linear", False: DEFAULT},
    "datasets": _datasets,
    "test_datasets": _datasets,
    "dataset_text_field": lambda value: {"text": value},
    "excess_length_strategy": {"raise": "error"},
    "truncation_mode": {"keep_start": "right", "keep_end": "left"},
    "group_by_length": {True: "group", False: DEFAULT},
    "train_sampling_strategy": {"group_by_length": "group", "random": DEFAULT},
    "train_on_inputs": {True: "all", False: "completion"},
    "train_on_prompt": {True: "all", False: "completion"},
    "mask_history": {True: "last", False: "assistant"},
    "completion_only_loss": {True: "completion", False: "all", None: DEFAULT},
    "assistant_only_loss": {True: "assistant", False: DEFAULT},
    # and values of our own keys
    "method": {
        "beft": "bitfit", "lntuning": "ln_tuning", "ln-tuning": "ln_tuning", "prompt-tuning": "prompt_tuning", "p-tuning": "p_tuning",
        "ptuning": "p_tuning", "prefix-tuning": "prefix_tuning",
    },
    "optim": dict.fromkeys(
        "adam adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_anyprecision adamw_hf adamw_jax paged_adamw "
        "paged_adamw_32bit".split(),
        "adamw",
    )
    | {"lion_32bit": "lion", "paged_lion_32bit": "lion", "paged_lion_8bit": "lion_8bit"}
    | dict.fromkeys("adamw_bnb_8bit paged_adamw_8bit adamw8bit".split(), "adamw_8bit"),
    "optim_args": _optim_args,
    "id2label": _label_names,
    "label2id": _label_numbers,
    "lr_scheduler_type": {"wsd": "warmup_stable_decay"},
    "dtype": {"bf16": "bfloat16", "fp32": "float32", "torch.bfloat16": "bfloat16", "torch.float32": "float32"},
    "attention": dict.fromkeys("sdpa eager flash_attention_2 flash_attention_3 flex_attention".split(), "auto"),
    "gradient_checkpointing": {"unsloth": "offload"},
    "activation_offloading": {True: "offload", False: DEFAULT},
    "chat_template": {"tokenizer_default": DEFAULT},
    "val_set_size": {0: DEFAULT},
    "val_size": {0: DEFAULT},
    "report_to": {"none": [], None: [], "all": ["tensorboard"]},
}

_MESH = "one program runs over all devices; write mesh: {data: -1, fsdp: 1, tensor: 1}, with fsdp above 1 to share the weights out"
_FP16 = "float16 overflows without loss scaling; write dtype: bfloat16"
_HUB = "nothing is uploaded; push the result folder yourself with `hf upload`"

# What a torch tool's key is here. A key that asks for nothing (`fp16: false`, `deepspeed: null`) is let through with a note.
DIFFERENT: dict[str, str] = {
    key: here
    for here, keys in {
        _MESH: "fsdp fsdp_config fsdp_version deepspeed parallelism_config tensor_parallel_size context_parallel_size num_processes "
        "accelerator_config device_map",
        _FP16: "fp16 fp16_full_eval half_precision_backend",
        _HUB: "push_to_hub hub_model_id hub_strategy hub_private_repo hub_token hub_always_push",
        "write data.max_length: prompt and answer together, of grpo and rloo the prompt alone": "max_prompt_length",
        "every row is seen in every epoch, and none is left out at its end": "dataloader_drop_last",
        "packing never cuts a row; write data.packing: true, and data.length_policy for rows that are too long": "packing_strategy",
        "`jaxtune plan` finds the largest batch that fits, before the run": "auto_find_batch_size",
        "a folder that holds a run is never overwritten; write another output_dir, or resume: true": "overwrite_output_dir",
        "the tokenizer's own chat template is used; write data.chat_template: FILE.jinja for another": "template",
        "write loss_type: [sigmoid, sft] and loss_weights: [1, ALPHA]": "rpo_alpha",
        "it is offered for preference losses only, as label_smoothing": "label_smoothing_factor",
        "write report_to: tensorboard; metrics.jsonl is always written": "use_wandb use_swanlab",
        "write eval_steps: SHARE, a part of all steps such as 0.25": "evals_per_epoch",
        "write save_steps: SHARE, a part of all steps such as 0.25": "saves_per_epoch",
        "write data.train: {path: FILE, limit: ROWS}": "max_samples",
        "the model's own tokenizer is used; put another into the model's folder": "tokenizer tokenizer_name tokenizer_name_or_path",
        "the tokenizer's own special tokens are used, and padding needs none; change them in its tokenizer_config.json": "eos_token "
        "special_tokens",
        "write the keys themselves (dtype, quantization, attention)": "model_init_kwargs",
        "write model: NAME@REVISION": "model_revision hub_revision",
        "rows are judged from the first evaluation on; write eval_steps": "eval_delay",
        "answers are drawn by jaxtune itself, on the devices that train": "use_vllm vllm_mode vllm_model_impl vllm_server_base_url "
        "vllm_server_host vllm_server_port",
        "write steps_per_generation": "generation_batch_size",
        "write lora.lora_dropout: 0, which is the default": "disable_dropout",
        "write the keys themselves (temperature, top_p, top_k, min_p, repetition_penalty)": "generation_kwargs",
        "the loss has no entropy bonus; write top_entropy_quantile, or epsilon_high above epsilon": "entropy_coef use_adaptive_entropy",
    }.items()
    for key in keys.split()
}

# Keys that cannot change a result here: how torch is driven, what is always so, what is only shown. A note says why they are left out.
LEFT_OUT: dict[str, str] = {
    key: why
    for why, keys in {
        "every step is compiled by XLA": "torch_compile torch_compile_backend torch_compile_mode jit_mode_eval tf32 use_unsloth "
        "no_cuda use_cpu",
        "batches are a pure function of the step number, and no loader runs": "dataloader_num_workers dataloader_pin_memory "
        "dataloader_prefetch_factor dataloader_persistent_workers remove_unused_columns ignore_data_skip length_column_name",
        "packed rows are kept apart by every kind of attention": "flash_attention padding_free neat_packing xformers_attention "
        "sdp_attention flash_attn eval_packing eval_sample_packing",
        "the loss is always computed in chunks": "use_liger_kernel use_liger liger_kernel_config eval_accumulation_steps "
        "prediction_loss_only",
        "the loss is always divided by the tokens of the whole batch": "average_tokens_across_devices",
        "rows are tokenised on all cores, once": "dataset_num_proc preprocessing_num_workers dataset_processes overwrite_cache",
        "rows are padded to data.max_length only": "pad_to_sequence_len pad_to_multiple_of",
        "one program runs over all devices": "ddp ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers local_rank",
        "gradient_checkpointing says all of it": "gradient_checkpointing_kwargs",
        "it is for torch's storage of packed weights": "bnb_4bit_quant_storage",
        "answers are drawn by jaxtune itself": "cache_implementation vllm_gpu_memory_utilization vllm_tensor_parallel_size "
        "vllm_enable_sleep_mode vllm_importance_sampling_correction vllm_importance_sampling_mode ds3_gather_for_generation",
        "the product with the head is always taken to float32": "cast_lm_head_to_fp32",
        "log_completions writes them all": "num_completions_to_print log_unique_prompts log_multimodal",
        "no code from a model's folder is ever run": "trust_remote_code",
        "a loss that is not finite stops the run and names the step": "logging_nan_inf_filter",
        "config.json says what the model is": "model_type tokenizer_type task_type lora_task_type is_llama_derived_model "
        "is_mistral_derived_model",
        "data.train and data.eval say what is done": "do_train do_eval do_predict",
        "loss.png, metrics.jsonl and the terminal always have it": "plot_loss logging_first_step include_num_input_tokens_seen "
        "disable_tqdm log_level wandb_project wandb_entity wandb_name wandb_watch wandb_log_model wandb_run_id",
        "checkpoints hold all that a resume needs, and results are safetensors": "save_only_model save_safetensors enable_jit_checkpoint "
        "full_determinism",
        "it changes no number": "skip_memory_metrics torch_empty_cache_steps strict debug",
    }.items()
    for key in keys.split()
}

# Several of bitsandbytes' keys make one of ours.
BITSANDBYTES = (
    "load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "use_bnb_nested_quant",
    "double_quantization",
)  # fmt: skip


def bitsandbytes(given: dict[str, Any]) -> str | None:
    """`load_in_4bit` and its companions as a value of `quantization`."""
    four = given.get("load_in_4bit") or given.get("quantization_bit") == 4
    eight = given.get("load_in_8bit") or given.get("quantization_bit") == 8
    double = any(given.get(key) for key in ("bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization"))
    bits, kind = given.get("quantization_bit"), given.get("bnb_4bit_quant_type", "nf4")
    if bits not in (None, 4, 8):
        raise ConfigError(f"quantization_bit is {bits!r}, but has to be 4 or 8; or write quantization: nf4, nf4-dq or int8.")
    if four and kind != "nf4":
        raise ConfigError(f"bnb_4bit_quant_type is {kind!r}, but weights are quantised to nf4; write quantization: nf4.")
    if four and eight:
        raise ConfigError("both 4 and 8 bits are asked for; write quantization: nf4, nf4-dq or int8.")
    return ("nf4-dq" if double else "nf4") if four else "int8" if eight else None
