"""Other spellings that are understood, and keys of torch tools that are done differently here.

An alias is a new name, or a function of the value that gives {key: value}. Using one prints a one-line note.
"""

from collections.abc import Callable
from typing import Any

from jaxtune.errors import ConfigError

Updates = dict[str, Any]


def _rename(path: str) -> Callable[[Any], Updates]:
    return lambda value: {path: value}


def _choice(path: str, values: dict[Any, Any]) -> Callable[[Any], Updates]:
    """The value is translated by a table; what the table lacks is passed on, for the key's own check to judge."""
    return lambda value: {path: values.get(value, value)} if values.get(value, value) is not None else {}


def _warmup_ratio(value: Any) -> Updates:
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"warmup_ratio is {value!r}, but has to be a share of all steps, from 0 to below 1; for a number write warmup_steps.")
    return {"warmup_steps": value}


def _resume(value: Any) -> Updates:
    if isinstance(value, str) and value not in ("last", "latest", "auto", "allow"):
        raise ConfigError(f"resume_from_checkpoint is {value!r}, but a run resumes from its own newest checkpoint; write output_dir and resume: true.")
    return {"resume": bool(value)}


def _truncation_mode(value: Any) -> Updates:
    sides = {"keep_start": "right", "keep_end": "left"}
    if value not in sides:
        raise ConfigError(f"truncation_mode is {value!r}, but has to be one of keep_start, keep_end.")
    return {"data.length_policy": "truncate", "data.truncation_side": sides[value]}


def _target(value: Any) -> Updates:
    return {"lora.target_modules": "all-linear" if value == "all" else value.split(",") if isinstance(value, str) and "," in value else value}


def _optim_args(value: Any) -> Updates:
    """HF's `"rho=0.9,decay=1e-3"`; a table is passed on."""
    return {"optim_args": dict(pair.split("=", 1) for pair in value.replace(" ", "").split(","))} if isinstance(value, str) else {"optim_args": value}


_AXOLOTL_TYPES = {"alpaca": "alpaca", "completion": "text", "chat_template": "messages", "sharegpt": "sharegpt"}


def _datasets(value: Any) -> Updates:
    """Axolotl's list of {path, type, ...}: `type` is our `format`."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return {"data.train": value}
    sources = []
    for entry in value:
        if isinstance(entry, dict) and "type" in entry:
            kind = entry["type"]
            if kind not in _AXOLOTL_TYPES:
                raise ConfigError(f"datasets type is {kind!r}, but only {', '.join(_AXOLOTL_TYPES)} are understood; write data.train with format and columns.")
            entry = {key: item for key, item in entry.items() if key != "type"} | {"format": _AXOLOTL_TYPES[kind]}
        sources.append(entry)
    return {"data.train": sources}


ALIASES: dict[str, Callable[[Any], Updates]] = {
    alias: _rename(path)
    for path, names in {
        "model": "base_model model_name_or_path model_name pretrained_model_name_or_path",
        "method": "finetuning_type adapter",
        "dtype": "torch_dtype bnb_4bit_compute_dtype compute_dtype",
        "per_device_train_batch_size": "micro_batch_size batch_size train_batch_size per_gpu_train_batch_size",
        "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
        "gradient_accumulation_steps": "grad_accum gradient_accumulation",
        "num_train_epochs": "num_epochs epochs",
        "learning_rate": "lr",
        "max_grad_norm": "gradient_clipping grad_clip",
        "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
        "attention": "attn_implementation",
        "eval_strategy": "evaluation_strategy",
        "logging_steps": "log_every_n_steps",
        "lora.r": "lora_r lora_rank",
        "lora.lora_alpha": "lora_alpha",
        "lora.lora_dropout": "lora_dropout",
        "lora.use_rslora": "use_rslora peft_use_rslora",
        "lora.use_dora": "use_dora peft_use_dora",
        "lora.modules_to_save": "lora_modules_to_save additional_target",
        "lora.rank_pattern": "lora_rank_pattern",
        "lora.alpha_pattern": "lora_alpha_pattern",
        "lora.target_parameters": "lora_target_parameters",
        "lora.init_lora_weights": "peft_init_lora_weights init_lora_weights",
        "lora.trainable_token_indices": "peft_trainable_token_indices trainable_token_indices",
        "data.train": "dataset train_file train_dataset dataset_name train_data",
        "data.eval": "val_set_size val_size validation_file eval_dataset eval_file test_datasets",
        "data.max_length": "max_length max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size",
        "data.packing": "packing sample_packing",
        "data.shuffle": "shuffle_dataset",
        "data.num_proc": "dataset_num_proc preprocessing_num_workers dataset_processes",
        "data.chat_template": "chat_template chat_template_path",
        "data.cache_dir": "dataset_prepared_path tokenized_path",
    }.items()
    for alias in names.split()
} | {
    "warmup_ratio": _warmup_ratio,
    "resume_from_checkpoint": _resume,
    "lora_target": _target,
    "lora_target_modules": _target,
    "lora_target_linear": _choice("lora.target_modules", {True: "all-linear", False: None}),
    "use_peft": _choice("method", {True: "lora", False: "full"}),
    "full_finetuning": _choice("method", {True: "full", False: None}),
    "bf16": _choice("dtype", {True: "bfloat16", False: None}),
    "stage": _choice("objective", {"pt": "sft", "rm": "reward"}),
    "rl": _choice("objective", {"ipo": "dpo"}),
    "train_on_inputs": _choice("data.train_on", {True: "all", False: "completion"}),
    "train_on_prompt": _choice("data.train_on", {True: "all", False: "completion"}),
    "mask_history": _choice("data.train_on", {True: "last", False: "assistant"}),
    "completion_only_loss": _choice("data.train_on", {True: "completion", False: "all"}),
    "assistant_only_loss": _choice("data.train_on", {True: "assistant", False: None}),
    "group_by_length": _choice("data.packing", {True: "group", False: None}),
    "train_sampling_strategy": _choice("data.packing", {"group_by_length": "group", "random": None}),
    "truncation_mode": _truncation_mode,
    "excess_length_strategy": _choice("data.length_policy", {"raise": "error"}),
    "dataset_text_field": lambda value: {"data.columns": {"text": value}},
    "datasets": _datasets,
}  # fmt: skip

_ADAM = dict.fromkeys(
    "adam adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_anyprecision adamw_hf adamw_jax paged_adamw "
    "paged_adamw_32bit".split(),
    "adamw",
)
VALUES: dict[str, dict[Any, Any]] = {
    "optim": _ADAM | dict.fromkeys(["lion_32bit", "paged_lion_32bit"], "lion"),
    "lr_scheduler_type": {"wsd": "warmup_stable_decay", "warmup_stable_decay_linear": "warmup_stable_decay"},
    "method": {"adapter": "lora"},
    "dtype": {"bf16": "bfloat16", "fp32": "float32", "torch.bfloat16": "bfloat16", "torch.float32": "float32", "float": "float32"},
    "attention": dict.fromkeys(["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"], "auto"),
    "gradient_checkpointing": {"unsloth": True},
    "report_to": {"none": [], "all": ["tensorboard"]},
    "quantization": {"nf4_dq": "nf4-dq", "4bit": "nf4", "8bit": "int8"},
}

OPTIMIZER = ("optim", "optimizer")  # names of one key whose value is translated as well
SCHEDULER = ("lr_scheduler_type", "lr_scheduler", "scheduler")
ALIASES |= {name: _rename(names[0]) for names in (OPTIMIZER, SCHEDULER) for name in names[1:]}

_MESH = "one program runs over all devices; write mesh: {data: -1, fsdp: 1, tensor: 1}, fsdp for weights that do not fit one device"
_JIT = "every step is compiled by XLA; leave it out"
_FP16 = "float16 overflows without loss scaling; write dtype: bfloat16"
_HUB = "nothing is uploaded; push the result folder yourself with `hf upload`"
_LOADER = "batches are a pure function of the step number and no loader runs; leave it out"
_ATTENTION = "attention: auto keeps packed rows apart on every backend; leave it out"
_NAN = "a loss that is not finite stops the run and names the step; leave it out"

# What a torch tool's key is here. A key asked for nothing (`fp16: false`, `deepspeed: null`) is let through with a note.
DIFFERENT: dict[str, str] = (
    dict.fromkeys("fsdp fsdp_config fsdp_version deepspeed parallelism_config tensor_parallel_size context_parallel_size num_processes "
                  "accelerator_config device_map ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb "
                  "ddp_broadcast_buffers".split(), _MESH)
    | dict.fromkeys("torch_compile torch_compile_backend torch_compile_mode jit_mode_eval".split(), _JIT)
    | dict.fromkeys("fp16 fp16_full_eval half_precision_backend".split(), _FP16)
    | dict.fromkeys("push_to_hub hub_model_id hub_strategy hub_private_repo hub_token hub_always_push".split(), _HUB)
    | dict.fromkeys("dataloader_num_workers dataloader_pin_memory dataloader_drop_last dataloader_prefetch_factor "
                    "dataloader_persistent_workers remove_unused_columns ignore_data_skip".split(), _LOADER)
    | dict.fromkeys("flash_attention padding_free neat_packing pad_to_sequence_len xformers_attention sdp_attention flash_attn".split(), _ATTENTION)
    | {
        "use_liger_kernel": "the chunked loss is always on; write logits_chunk_size to set its size",
        "use_liger": "the chunked loss is always on; write logits_chunk_size to set its size",
        "tf32": "write dtype: bfloat16 or float32",
        "gradient_checkpointing_kwargs": "write gradient_checkpointing: true, false, or the name of a remat policy",
        "packing_strategy": "packing never cuts a row; write data.packing: true, and data.length_policy for rows that are too long",
        "trust_remote_code": "no code from a model's folder is ever run; leave it out",
        "auto_find_batch_size": "`jaxtune plan` finds the largest batch that fits, before the run",
        "logging_nan_inf_filter": _NAN,
        "overwrite_output_dir": "a folder that holds a run is never overwritten; write another output_dir, or resume: true",
        "use_unsloth": "leave it out",
        "template": "the tokenizer's own chat template is used; write data.chat_template: FILE.jinja for another",
        "rpo_alpha": "write loss_type: [sigmoid, sft] and loss_weights: [1, ALPHA]",
        "max_prompt_length": "write data.max_length, the prompt and the answer together",
        "max_completion_length": "write data.max_length, the prompt and the answer together",
        "average_tokens_across_devices": "the loss is always divided by the tokens of the whole batch; leave it out",
        "label_smoothing_factor": "it is not offered; for preference losses write label_smoothing",
        "bnb_4bit_quant_storage": "it changes no number; leave it out",
        "wandb_project": "write report_to: tensorboard; metrics.jsonl is always written",
    }
)  # fmt: skip

# Three of bitsandbytes' keys make one of ours.
BITSANDBYTES = {
    "load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "use_bnb_nested_quant",
    "double_quantization",
}  # fmt: skip


def bitsandbytes(given: dict[str, Any]) -> Updates:
    """`load_in_4bit` and its companions as `quantization`."""
    four = given.get("load_in_4bit") or given.get("quantization_bit") == 4
    eight = given.get("load_in_8bit") or given.get("quantization_bit") == 8
    double = any(given.get(key) for key in ("bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization"))
    if given.get("quantization_bit") not in (None, 4, 8):
        raise ConfigError(f"quantization_bit is {given['quantization_bit']!r}, but has to be 4 or 8; or write quantization: nf4, nf4-dq or int8.")
    if given.get("bnb_4bit_quant_type", "nf4") != "nf4":
        raise ConfigError(f"bnb_4bit_quant_type is {given['bnb_4bit_quant_type']!r}, but weights are quantised to nf4; write quantization: nf4.")
    if four and eight:
        raise ConfigError("load_in_4bit and load_in_8bit are both true; write quantization: nf4, nf4-dq or int8.")
    return {"quantization": ("nf4-dq" if double else "nf4") if four else "int8"} if four or eight else {}
