"""Alternative spellings of keys, and keys of torch tools that work differently here.

`ALIASES` names the key that an alias stands for. `TRANSLATE`, by alias or by key, converts a value of other tools: by a table (values that
it lacks are passed on for the key's own check) or by a function. Using an alias prints a one-line note.
"""

from typing import Any

from jaxtune.config import foreign
from jaxtune.config.foreign import DEFAULT
from jaxtune.errors import ConfigError

ALIASES: dict[str, str] = {
    alias: path
    for path, names in {
        "model": "base_model model_name_or_path model_name pretrained_model_name_or_path",
        "method": "finetuning_type adapter use_peft full_finetuning",
        "objective": "stage rl",
        "loss_type": "pref_loss dpo_loss_type",
        "beta": "rl_beta pref_beta",
        "desirable_weight": "kto_chosen_weight kto_desirable_weight",
        "undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
        "init_adapter": "adapter_name_or_path lora_model_dir",
        "seed": "random_state",
        "resume": "resume_from_checkpoint",
        "dtype": "torch_dtype bnb_4bit_compute_dtype compute_dtype bf16",
        "per_device_train_batch_size": "micro_batch_size batch_size train_batch_size per_gpu_train_batch_size",
        "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
        "gradient_accumulation_steps": "grad_accum gradient_accumulation",
        "num_train_epochs": "num_epochs epochs",
        "learning_rate": "lr",
        "lr_scheduler_type": "lr_scheduler scheduler",
        "warmup_steps": "warmup_ratio num_warmup_steps",
        "optim": "optimizer adafactor",
        "max_grad_norm": "gradient_clipping grad_clip clip_grad_norm",
        "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing activation_offloading "
        "enable_activation_checkpointing enable_activation_offloading disable_gradient_checkpointing",
        "attention": "attn_implementation",
        "eval_strategy": "evaluation_strategy",
        "eval_steps": "run_val_every_n_steps",
        "save_steps": "save_every_n_steps",
        "evaluate.max_new_tokens": "eval_max_new_tokens",
        "logging_steps": "log_every_n_steps",
        "lora.r": "lora_r lora_rank r",
        "lora.lora_alpha": "lora_alpha",
        "lora.lora_dropout": "lora_dropout disable_dropout",
        "lora.bias": "bias",
        "lora.target_modules": "lora_target lora_target_modules lora_target_linear target_modules",
        "lora.use_rslora": "use_rslora peft_use_rslora",
        "lora.use_dora": "use_dora peft_use_dora",
        "lora.modules_to_save": "lora_modules_to_save additional_target modules_to_save",
        "lora.rank_pattern": "lora_rank_pattern",
        "lora.alpha_pattern": "lora_alpha_pattern",
        "lora.target_parameters": "lora_target_parameters",
        "lora.loftq_config.loftq_bits": "loftq_config.loftq_bits peft.loftq_config.loftq_bits",
        "lora.loftq_config.loftq_iter": "loftq_config.loftq_iter",
        "lora.init_lora_weights": "peft_init_lora_weights init_lora_weights pissa_init",
        "lora.trainable_token_indices": "peft_trainable_token_indices trainable_token_indices",
        "data.train": "dataset datasets train_file train_dataset dataset_name train_data pretraining_dataset",
        "data.eval": "val_set_size val_size validation_file eval_dataset eval_file test_datasets test_split_size",
        "data.columns": "dataset_text_field column_map",
        "data.max_length": "max_length max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size",
        "data.length_policy": "excess_length_strategy",
        "data.truncation_side": "truncation_mode",
        "data.packing": "packing sample_packing packed group_by_length train_sampling_strategy",
        "data.train_on": "train_on_inputs train_on_input train_on_prompt masking_strategy mask_history completion_only_loss "
        "assistant_only_loss",
        "data.shuffle": "shuffle_dataset shuffle shuffle_merged_datasets",
        "data.chat_template": "chat_template chat_template_path",
        "data.eos_token": "eos_token special_tokens",
        "data.cache_dir": "dataset_prepared_path tokenized_path",
        "data.system": "default_system new_system_prompt",
        "data.streaming": "streaming dataset_streaming",
        "id2label": "label2id",
        "trainable_parameters": "unfrozen_parameters",
        "teacher": "teacher_model_name_or_path teacher_model",
        "reward_model": "reward_model_name_or_path reward_model_path",
        "num_ppo_epochs": "ppo_epochs",
        "kl_coef": "init_kl_coef",
        "whiten_rewards": "ppo_whiten_rewards",
        "max_completion_length": "response_length",
    }.items()
    for alias in names.split()
}


TRANSLATE: dict[str, foreign.Translation] = {
    "adapter": {None: "full"},
    "use_peft": {True: "lora", False: "full"},
    "full_finetuning": {True: "full", False: DEFAULT},
    "bf16": {True: "bfloat16", False: DEFAULT, "auto": "auto"},
    "stage": {"pt": "sft", "rm": "reward"},
    "objective": {"gkd": "distill", "kd": "distill"},
    "resume_from_checkpoint": foreign.resume,
    "warmup_ratio": foreign.warmup_ratio,
    "lora_target": foreign.target,
    "lora_target_modules": foreign.target,
    "lora_target_linear": {True: "all-linear", False: DEFAULT},
    "datasets": foreign.datasets,
    "test_datasets": foreign.datasets,
    "pretraining_dataset": foreign.datasets,
    "dataset": foreign.names,
    "eval_dataset": foreign.names,
    "column_map": foreign.column_map,
    "dataset_text_field": lambda value: {"text": value},
    "excess_length_strategy": {"raise": "error"},
    "truncation_mode": {"keep_start": "right", "keep_end": "left"},
    "group_by_length": {True: "group", False: DEFAULT},
    "train_sampling_strategy": foreign.sampling,
    "masking_strategy": {"train_on_all": "all", "train_on_assistant": "assistant", "train_on_last": "last"},
    "train_on_input": {True: "all", False: "completion"},
    "pref_loss": foreign.pref_loss,
    "adafactor": {True: "adafactor", False: DEFAULT},
    "disable_dropout": {True: 0.0, False: DEFAULT},
    "pissa_init": {True: "pissa", False: DEFAULT},
    "disable_gradient_checkpointing": {True: False, False: DEFAULT},
    "enable_activation_offloading": {True: "offload", False: DEFAULT},
    "train_on_inputs": {True: "all", False: "completion"},
    "train_on_prompt": {True: "all", False: "completion"},
    "mask_history": {True: "last", False: "assistant"},
    "completion_only_loss": {True: "completion", False: "all", None: DEFAULT},
    "assistant_only_loss": foreign.assistant_only,
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
    "optim_args": foreign.optim_args,
    "id2label": foreign.label_names,
    "label2id": foreign.label_numbers,
    "lr_scheduler_type": {"wsd": "warmup_stable_decay"},
    "dtype": {"bf16": "bfloat16", "fp32": "float32", "torch.bfloat16": "bfloat16", "torch.float32": "float32"},
    "attention": dict.fromkeys("sdpa eager flash_attention_2 flash_attention_3 flex_attention".split(), "auto"),
    "gradient_checkpointing": {"unsloth": "offload"},
    "activation_offloading": {True: "offload", False: DEFAULT},
    "chat_template": {"tokenizer_default": DEFAULT},
    "val_set_size": {0: DEFAULT},
    "val_size": {0: DEFAULT},
    "report_to": foreign.report_to,
    # and of keys that work differently: these values request nothing
    "model_revision": {"main": DEFAULT},
    "dataset_train_split": {"train": DEFAULT},
    "dataset_test_split": {"test": DEFAULT},
    "packing_strategy": {"bfd": DEFAULT},
    "fp16_opt_level": {"O1": DEFAULT},
    "half_precision_backend": {"auto": DEFAULT},
    "fp16_backend": {"auto": DEFAULT},
    "mixed_precision": {"bf16": DEFAULT},
    "logging_strategy": {"steps": DEFAULT},
    "mix_strategy": {"concat": DEFAULT},
    "quantization_method": {"bnb": DEFAULT, "bitsandbytes": DEFAULT},
    "eos_token": {"<EOS_TOKEN>": DEFAULT},  # what HF's to_dict() writes for any token
    "special_tokens": foreign.special_tokens,
    "stop_token": {"eos": DEFAULT},
}

_MESH = "one program runs over all devices; write mesh: {data: -1, fsdp: 1, tensor: 1}, with fsdp above 1 to share the weights out"
_FP16 = "float16 overflows without loss scaling; write dtype: bfloat16"
_HUB = "nothing is uploaded; push the result folder yourself with `hf upload`"

# What to write here for a torch tool's key. A key that requests nothing (`fp16: false`, `deepspeed: null`) is ignored with a note.
DIFFERENT: dict[str, str] = {
    key: here
    for here, keys in {
        _MESH: "fsdp fsdp_config fsdp_version deepspeed parallelism_config tensor_parallel_size context_parallel_size num_processes "
        "device_map fsdp_transformer_layer_cls_to_wrap sharded_ddp",
        _FP16: "fp16 fp16_full_eval half_precision_backend fp16_backend fp16_opt_level",
        _HUB: "push_to_hub hub_model_id push_to_hub_model_id log_completions_hub_repo",
        "write dtype: bfloat16 or float32": "mixed_precision",
        "write dtype: bfloat16, and with method: full also param_dtype: bfloat16": "pure_bf16 pure_fp16",
        "write data.train: {path: ID, name: SUBSET, split: SPLIT}, and data.eval likewise": "dataset_config dataset_train_split "
        "dataset_test_split",
        "write data.train: [{path: ID, weight: SHARE, split: SPLIT}, ...]": "dataset_mixer dataset_splits interleave_probs mix_strategy",
        "write data.train: FILE, the file of the rows itself": "dataset_dir dataset_info",
        "write data.quality: {exact_duplicate: drop}": "dataset_exact_deduplication",
        "write lora: {r: 16, lora_alpha: 32, ...} itself": "peft_config",
        "write quantization: nf4, nf4-dq or int8": "quantization_config quantization_method",
        "write method: qlora": "quantize_base",
        "write lora.target_modules: [q_proj, v_proj, ...], or all-linear": "lora_attn_modules apply_lora_to_mlp apply_lora_to_output",
        "init_adapter goes on with it, and saves it; to have a new one beside, export --merge the first": "create_new_adapter",
        "write optim: adamw, adamw_8bit, adafactor, lion, lion_8bit, sgd or muon": "use_galore use_apollo use_badam use_adam_mini use_muon "
        "optim_target_modules",
        "write lr_scheduler_type: cosine_with_min_lr and lr_scheduler_kwargs: {min_lr_rate: SHARE}": "cosine_min_lr_ratio",
        "write logging_steps, a number of steps or a share of them": "logging_strategy",
        "write max_steps, of the whole run": "max_steps_per_epoch",
        "write evaluate.metric: exact_match, or a function of yours": "predict_with_generate generate_during_eval include_for_metrics "
        "include_inputs_for_metrics label_names",
        "rows are made by data.columns, or data.format: my_module.my_function": "formatting_func dataset_kwargs",
        "write chat_template_kwargs into the rows": "enable_thinking chat_template_kwargs",
        "the reference is the base under the adapter; write ref_model: FOLDER for another, and objective: orpo, cpo or simpo for "
        "none": "reference_free force_use_ref_model model_adapter_name ref_adapter_name ref_model_adapters",
        "set variables of the environment in the shell": "env",
        "what liger and cut cross-entropy do is done anyway; other plugins are not offered": "plugins",
        "steps are counted: write max_steps, or num_train_epochs": "total_episodes",
        "an answer ends with the tokens that the model's generation_config.json names": "stop_token stop_token_id",
        "the KL has one weight throughout; write kl_coef": "adap_kl_ctrl ppo_target horizon",
        "write model: FOLDER": "sft_model_path",
        "write reward_model: FOLDER": "reward_model_type reward_model_adapters reward_model_quantization_bit",
        "the value head shares the model that is trained": "value_model value_model_path critic_model",
        "rewards count as they are; write whiten_rewards, or reward_weights": "ppo_score_norm use_score_scaling use_score_norm score_clip",
        "write the tokens into the rows' prompt_completion texts, or take the tokenizer's chat template": "response_template "
        "instruction_template",
        "write data.max_length: prompt and answer together, of grpo and rloo the prompt alone": "max_prompt_length",
        "every row is seen in every epoch, and none is left out at its end": "dataloader_drop_last",
        "packing never cuts a row; write data.packing: true, and data.length_policy for rows that are too long": "packing_strategy",
        "`jaxtune plan` finds the largest batch that fits, before the run": "auto_find_batch_size",
        "a folder that holds a run is never overwritten; write another output_dir, or resume: true": "overwrite_output_dir",
        "the tokenizer's own chat template is used; write data.chat_template: FILE.jinja for another": "template tool_format",
        "write loss_type: [sigmoid, sft] and loss_weights: [1, ALPHA]": "rpo_alpha pref_ftx",
        "it is offered for preference losses only, as label_smoothing": "label_smoothing_factor",
        "write report_to: tensorboard; metrics.jsonl is always written": "use_wandb use_swanlab enable_wandb use_mlflow use_comet",
        "write eval_steps: SHARE, a part of all steps: 1 / (evals_per_epoch x num_train_epochs)": "evals_per_epoch",
        "write save_steps: SHARE, a part of all steps: 1 / (saves_per_epoch x num_train_epochs)": "saves_per_epoch",
        "write data.train: {path: FILE, limit: ROWS}": "max_samples",
        "the model's own tokenizer is used; put another into the model's folder": "tokenizer tokenizer_name tokenizer_name_or_path",
        "write the keys themselves (dtype, quantization, attention)": "model_init_kwargs",
        "write model: NAME@REVISION": "model_revision",
        "rows are judged from the first evaluation on; write eval_steps": "eval_delay",
        "write steps_per_generation": "generation_batch_size",
        "write the keys themselves (temperature, top_p, top_k, min_p, repetition_penalty)": "generation_kwargs",
        "write method: full and trainable_parameters: [model.layers.(30|31)., lm_head], regexes of tensor names": "freeze_trainable_layers "
        "freeze_trainable_modules freeze_extra_modules finetune_last_n_layers",
        "write teacher_quantization": "teacher_model_init_kwargs",
        "write kd_ratio, the divergence's part of the loss": "kd_ce_alpha kd_alpha",
        "write temperature": "kd_temperature",
        "the loss has no entropy bonus; write top_entropy_quantile, or epsilon_high above epsilon": "entropy_coef use_adaptive_entropy",
        "an answer is drawn at one go, without tools": "tools max_tool_calling_iterations",
        "answers are free text; write reward_funcs: format and reward_pattern": "vllm_structured_outputs_regex vllm_guided_decoding_regex",
    }.items()
    for key in keys.split()
}

# Keys that cannot change a result here: how torch is run, what always holds, what is only displayed. A note says why they are ignored.
LEFT_OUT: dict[str, str] = {
    key: why
    for why, keys in {
        "every step is compiled by XLA": "torch_compile torch_compile_backend torch_compile_mode jit_mode_eval tf32 use_unsloth "
        "no_cuda use_cpu compile device use_mps_device use_ipex torchdynamo mp_parameters",
        "batches are a pure function of the step number, and no loader runs": "dataloader_num_workers dataloader_pin_memory "
        "dataloader_prefetch_factor dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order "
        "remove_unused_columns no_remove_unused_columns ignore_data_skip length_column_name buffer_size skip_prepare_dataset",
        "packed rows are kept apart by every kind of attention": "flash_attention padding_free neat_packing xformers_attention "
        "sdp_attention flash_attn eval_packing eval_sample_packing",
        "the loss is always computed in chunks": "use_liger_kernel use_liger enable_liger_kernel liger_kernel_config liger_rope "
        "liger_rms_norm liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy cut_cross_entropy num_output_chunks "
        "eval_accumulation_steps prediction_loss_only eval_do_concat_batches batch_eval_metrics eval_use_gather_object",
        "XLA writes the kernels": "lora_mlp_kernel lora_qkv_kernel lora_o_kernel",
        "norms and the loss are always taken in float32": "upcast_layernorm upcast_lmhead_output bf16_full_eval",
        "mean_token_accuracy is always measured": "compute_accuracy",
        "a loss that is no number stops the run, and loss_spike_sigma tells of jumps": "loss_watchdog_threshold loss_watchdog_patience",
        "adapters are saved by themselves": "save_adapter_weights_only",
        "batches of the reference are those of the evaluation": "precompute_ref_batch_size",
        "the sizes of batches follow from per_device_train_batch_size and the devices": "world_size num_total_batches local_batch_size "
        "local_mini_batch_size mini_batch_size",
        "answers are scored in the batches of a step": "local_rollout_forward_batch_size ppo_buffer_size",
        "the loss is always divided by the tokens of the whole batch": "average_tokens_across_devices",
        "rows are tokenised on all cores, once": "dataset_num_proc preprocessing_num_workers dataset_processes overwrite_cache",
        "rows are padded to data.max_length only": "pad_to_sequence_len pad_to_multiple_of pad_token",
        "one program runs over all devices": "ddp ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph local_rank accelerator_config split_batches dispatch_batches "
        "ray_scope custom_sharded_layers",
        "gradient_checkpointing says all of it": "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        "PEFT's files say it themselves": "lora_fan_in_fan_out fan_in_fan_out",
        "it is for torch's storage of packed weights": "bnb_4bit_quant_storage",
        "answers are drawn by jaxtune itself, on the devices that train": "use_vllm vllm_mode vllm_model_impl vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_max_model_length vllm_max_model_len "
        "vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_enable_sleep_mode vllm_importance_sampling_correction "
        "vllm_importance_sampling_mode vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
        "cache_implementation ds3_gather_for_generation use_cache use_transformers_paged use_transformers_continuous_batching "
        "transformers_continuous_batching_config",
        "it is of entropy_coef alone": "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
        "nothing is uploaded": "hub_strategy hub_private_repo hub_token hub_always_push hub_revision push_to_hub_organization "
        "push_to_hub_token",
        "the product with the head is always taken to float32": "cast_lm_head_to_fp32",
        "log_completions writes them all": "num_sample_generations num_completions_to_print log_unique_prompts log_multimodal",
        "no code from a model's folder is ever run": "trust_remote_code",
        "a loss that is not finite stops the run and names the step": "logging_nan_inf_filter",
        "config.json says what the model is": "model_type tokenizer_type task_type lora_task_type is_llama_derived_model "
        "is_mistral_derived_model",
        "data.train and data.eval say what is done": "do_train do_eval do_predict",
        "loss.png, metrics.jsonl and the terminal always have it": "plot_loss logging_first_step include_num_input_tokens_seen "
        "disable_tqdm log_level log_level_replica log_on_each_node logging_dir use_tensorboard eval_table_size log_peak_memory_stats "
        "project trackio_space_id trackio_bucket_id trackio_static_space_id wandb_project wandb_entity wandb_name wandb_watch "
        "wandb_log_model wandb_run_id wandb_mode",
        "checkpoints hold all that a resume needs, and results are safetensors": "save_only_model save_safetensors enable_jit_checkpoint "
        "full_determinism save_first_step save_on_each_node restore_callback_states_from_checkpoint",
        "it changes no number": "skip_memory_metrics torch_empty_cache_steps strict debug past_index use_legacy_prediction_loop",
    }.items()
    for key in keys.split()
}

# Several of bitsandbytes' keys form one of ours.
BITSANDBYTES = (
    "load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "use_bnb_nested_quant",
    "double_quantization",
)  # fmt: skip


def bitsandbytes(given: dict[str, Any]) -> str | None:
    """bitsandbytes: `load_in_4bit` and related keys as a value of `quantization`."""
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
