import dataclasses
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxtune.config import Config, LoraConfig, ObjectiveConfig, Source, describe, load_config
from jaxtune.config.aliases import ALIASES, DIFFERENT, LEFT_OUT, TRANSLATE
from jaxtune.config.load import PATHS
from jaxtune.errors import ConfigError

FULL = {
    "model": "m", "method": "qlora", "lora": {"r": 8, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj", "v_proj"]},
    "data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2, "columns": {"text": "body"}}], "eval": 0.1, "columns": {"prompt": "q"}},
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "mesh": {"data": 2, "fsdp": 4}, "evaluate": {"metric": "exact_match"},
}  # fmt: skip


def test_a_file_with_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nlearning_rate: 2e-4\nlora: {r: 8}\neval_strategy: no\ndata: {train: a.jsonl}\n")
    config = load_config(path, ["lora.r=32", "data.max_length=64", "lora.target_modules=[q_proj, o_proj]", "mesh={fsdp: 2}"])
    assert config.learning_rate == 2e-4 and config.lora.r == 32 and config.data.max_length == 64
    assert config.lora.target_modules == ("q_proj", "o_proj") and config.mesh.fsdp == 2
    assert config.eval_strategy == "no"  # which YAML reads as false
    assert config.data.train == (Source(path="a.jsonl"),)


@pytest.mark.parametrize("raw", [{"model": "m"}, FULL, {"model": "m", "objective": "dpo", "beta": 0.2, "loss_type": ["sigmoid", "sft"]}])
def test_plain_data_loads_to_an_equal_hashable_config(raw):
    config = load_config(raw)
    plain = config.to_dict()
    assert load_config(yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))) == config
    assert hash(load_config(plain)) == hash(config)


def test_what_python_hands_over_is_read_as_yaml_would_be():
    given = {"model": Path("m"), "lora": LoraConfig(r=4), "learning_rate": np.float64(1e-3), "resume_from_checkpoint": np.True_}
    assert load_config(given) == load_config({"model": "m", "lora": {"r": 4}, "learning_rate": 1e-3, "resume": True})


def test_tables_and_groups_are_dicts_on_the_surface():
    plain = load_config(FULL).to_dict()
    assert plain["lora"]["rank_pattern"] == {"q_proj": 4} and plain["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert plain["data"]["train"] == ["a.jsonl", {"path": "b.jsonl", "weight": 2.0, "columns": {"text": "body"}}]
    assert plain["data"]["eval"] == 0.1 and plain["evaluate"]["metric"] == ["exact_match"]
    assert "beta" not in plain  # a key of other objectives


def test_an_override_reaches_an_entry_of_a_table():
    assert load_config({"model": "m"}, ["lora.rank_pattern.q_proj=8"]).lora.rank_pattern == (("q_proj", 8),)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lora.rank", "lora.r"), ("lora.alpha", "lora.lora_alpha"), ("rank", "lora.r"), ("learning_rat", "learning_rate"),
        ("peft.r", "lora.r"), ("data.max_lenght", "data.max_length"), ("max_sequence_length", "data.max_length"),
        ("eval_stratgy", "eval_strategy"), ("mesh.fdsp", "mesh.fsdp"), ("Model", "model"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(given, meant):
    with pytest.raises(ConfigError, match=rf"^{given} is not a key; did you mean {meant}\?$"):
        load_config({"model": "m"}, [f"{given}=3"])


def test_a_key_like_no_other_gets_no_suggestion():
    with pytest.raises(ConfigError, match="^xyzzy is not a key.$"):
        load_config({"model": "m", "xyzzy": 1})
    with pytest.raises(ConfigError, match="has no path; name a file, folder, glob or hub id .rows in memory"):
        load_config({"model": "m", "data": {"train": [{"prompt": "a", "completion": "b"}]}})
    with pytest.raises(ConfigError, match=r"source.pth is not a key; did you mean source.path\?"):
        load_config({"model": "m", "data": {"train": [{"pth": "x"}]}})


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"max_steps": "long"}, "max_steps is 'long', but has to be a whole number"),
        ({"max_steps": 1.5}, "max_steps is 1.5"),
        ({"per_device_train_batch_size": True}, "per_device_train_batch_size is True"),
        ({"learning_rate": "2e-4"}, "learning_rate is '2e-4', but has to be a finite number"),
        ({"data": {"packing": "grup"}}, "data.packing is 'grup', but has to be true, false or group. Did you mean group?"),
        ({"lora": 4}, "lora is 4, but is a group of keys (r, lora_alpha"),
        ({"lora": {"rank_pattern": [4]}}, "lora.rank_pattern is [4], but has to be a table {name: a whole number}"),
        (
            {"optim": "adamv"},
            "optim is 'adamv', but has to be adamw, adamw_8bit, adafactor, lion, lion_8bit, sgd or muon. Did you mean adamw?",
        ),
        ({"report_to": "wandb"}, "report_to is 'wandb'"),
    ],
)
def test_a_wrong_value_names_key_value_and_expected(raw, says):
    with pytest.raises(ConfigError) as caught:
        load_config({"model": "m"} | raw)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\nseed: 1\nseed: 2\n", "line 3: seed is given twice"),
        ("model: [m\n", "is not YAML"),
        ("model: m\ndata:\n\ttrain: a\n", "line 3, column 1: found character .* any token; indent with spaces"),
        ("model:m\ndata: {}\n", "line 2, column 5: mapping values are not allowed here; here or in the line before, a colon"),
        ("model: 'm\nseed: 1\n", "line 3, column 1: while scanning a quoted scalar that begins in line 1, found unexpected end"),
        ("model: m\ndata:\n  train: *.jsonl\n", "line 3, column 11: expected alphabetic .* needs quotes: \"\\*.jsonl\" in a file"),
        ("- model\n", "holds no keys"),
        ("", "holds nothing"),
        ("model: m\n\udc80", "is not text in UTF-8"),
    ],
)
def test_a_bad_file_is_one_clear_error(text, says, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=says):
        load_config(path)


def test_a_missing_file_and_bad_overrides(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="'lora.r' is not an override; write key=value"):
        load_config({"model": "m"}, ["lora.r"])
    with pytest.raises(ConfigError, match="the value of lora.r is not YAML"):
        load_config({"model": "m"}, ["lora.r=[1"])
    with pytest.raises(ConfigError, match="set PYTHONUTF8=1"):
        load_config({"model": "m"}, ["run_name=\udcc3\udca9"])


# a value that each alias accepts, if 1 does not work
EXAMPLES = {
    "bool": True, "str": "x", "finetuning_type": "lora", "adapter": "qlora", "stage": "sft", "rl": "dpo", "lr_scheduler": "cosine",
    "scheduler": "cosine", "optimizer": "adamw_torch_fused", "evaluation_strategy": "no", "warmup_ratio": 0.1, "torch_dtype": "float32",
    "compute_dtype": "bf16", "bnb_4bit_compute_dtype": "bfloat16", "truncation_mode": "keep_end", "excess_length_strategy": "raise",
    "lora_rank_pattern": {"q": 1}, "lora_alpha_pattern": {"q": 1}, "peft_trainable_token_indices": [1], "trainable_token_indices": [1],
    "train_sampling_strategy": "group_by_length", "lora_dropout": 0.1, "attn_implementation": "sdpa",
    "max_length": 64, "max_seq_length": 64, "max_seq_len": 64, "sequence_len": 64, "cutoff_len": 64, "model_max_length": 64,
    "block_size": 64,
    "use_peft": True, "ppo_whiten_rewards": True,
    "lora_target_linear": True, "full_finetuning": False, "bf16": True, "train_on_inputs": True, "train_on_prompt": True,
    "mask_history": True, "completion_only_loss": True, "assistant_only_loss": True, "group_by_length": True, "packing": True,
    "sample_packing": True, "use_gradient_checkpointing": "unsloth", "activation_checkpointing": True,
    "activation_offloading": True, "resume_from_checkpoint": True,
    "use_rslora": True, "peft_use_rslora": True, "use_dora": True, "peft_use_dora": True, "shuffle_dataset": False,
    "label2id": {"bad": 0, "good": 1}, "pref_loss": "hinge", "dpo_loss_type": "ipo", "adafactor": True, "disable_dropout": True,
    "bias": "all", "r": 4, "pissa_init": True, "pretraining_dataset": [{"path": "x", "type": "pretrain"}], "test_split_size": 0.1,
    "column_map": {"input": "q", "output": "a"}, "packed": True, "train_on_input": True, "masking_strategy": "train_on_last",
    "shuffle": False, "shuffle_merged_datasets": False, "default_system": "x", "new_system_prompt": "x",
    "enable_activation_checkpointing": True, "enable_activation_offloading": True, "disable_gradient_checkpointing": True,
    "streaming": True, "dataset_streaming": True,
    "init_lora_weights": True, "peft_init_lora_weights": "gaussian", "num_epochs": 2, "dataset_text_field": "body",
    "loftq_config.loftq_bits": 8, "peft.loftq_config.loftq_bits": 8, "special_tokens": {"eos_token": "</s>", "pad_token": "<pad>"},
}  # fmt: skip


OF = {
    "label2id": "classification", "reward_model_name_or_path": "grpo", "reward_model_path": "grpo", "kto_chosen_weight": "kto",
    "kto_desirable_weight": "kto", "kto_rejected_weight": "kto", "kto_undesirable_weight": "kto",
    "teacher_model_name_or_path": "distill", "teacher_model": "distill", "ppo_epochs": "ppo", "init_kl_coef": "ppo",
    "ppo_whiten_rewards": "ppo", "response_length": "ppo",
} | dict.fromkeys(("pref_loss", "dpo_loss_type", "rl_beta", "pref_beta"), "dpo")  # fmt: skip  # aliases of one objective's keys
NEEDED = {alias: {"objective": name} for alias, name in OF.items()}
NEEDED |= {"unfrozen_parameters": {"method": "full"}, "run_val_every_n_steps": {"data": {"eval": 0.1}}}
NEEDED |= {alias: {"quantization": "int8" if alias.endswith("bits") else "nf4", "lora": {"init_lora_weights": "loftq"}}
           for alias in ALIASES if "loftq" in alias}


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_lands_on_its_key_with_a_note(alias, caplog):
    kind = str(PATHS[ALIASES[alias]])
    value = EXAMPLES.get(alias, 2 if ("int" in kind or "float" in kind) and "Source" not in kind else "x")
    base = {} if ALIASES[alias] == "model" else {"model": "m"} | NEEDED.get(alias, {})
    with caplog.at_level(logging.WARNING, "jaxtune"):
        config = load_config(base | {alias: value})
    assert caplog.messages == [f"note: {alias} is read as {ALIASES[alias]}"]
    default = load_config({"model": "m"})
    here, there = config, default
    for name in ALIASES[alias].split("."):
        here, there = getattr(here, name), getattr(there, name)
    asks_for_the_default = {"lora_target_linear", "full_finetuning", "completion_only_loss", "evaluation_strategy", "packing",
                            "sample_packing", "attn_implementation",
                            "finetuning_type", "stage", "use_peft", "optimizer", "excess_length_strategy",
                            "init_lora_weights", "packed", "disable_dropout", "assistant_only_loss"}  # fmt: skip
    assert (here == there) == (alias in asks_for_the_default)


def test_aliases_stand_for_real_keys_and_hide_none():
    assert set(ALIASES.values()) <= set(PATHS)
    names = [*ALIASES, *DIFFERENT, *LEFT_OUT, *PATHS]
    assert len(names) == len(set(names))
    assert set(TRANSLATE) <= set(ALIASES) | set(PATHS) | set(DIFFERENT)


@pytest.mark.parametrize("key", DIFFERENT)
def test_a_torch_key_is_refused_with_what_to_write_but_may_ask_for_nothing(key, caplog):
    with pytest.raises(ConfigError, match=f"^{key} is a key of torch tools that works differently here: ") as caught:
        load_config({"model": "m", key: "full_shard"})
    assert DIFFERENT[key] in str(caught.value)
    assert load_config({"model": "m", key: False}) == load_config({"model": "m"})
    assert f"note: {key}=false has no effect here" in caplog.text


@pytest.mark.parametrize("keys", [{"packing": False, "group_by_length": True}, {"group_by_length": True, "data": {"packing": False}}])
def test_rows_grouped_by_length_are_not_packed(keys):
    assert load_config({"model": "m"} | keys).data.packing == "group"


@pytest.mark.parametrize("value", [True, 8, "any", None])
def test_keys_that_cannot_change_a_result_are_left_out_with_the_reason(value, caplog):
    assert load_config({"model": "m"} | dict.fromkeys(LEFT_OUT, value)) == load_config({"model": "m"})
    assert [f"note: {key} is ignored: {why}" for key, why in LEFT_OUT.items()] == caplog.messages


@pytest.mark.parametrize(
    ("given", "quantization"),
    [
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}, "nf4-dq"),
        ({"quantization_bit": 4, "double_quantization": True}, "nf4-dq"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
        ({"load_in_4bit": False}, None),
    ],
)
def test_bitsandbytes_keys(given, quantization):
    assert load_config({"model": "m", "method": "lora"} | given).quantization == quantization


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "quantised to nf4"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both 4 and 8 bits"),
        ({"quantization_bit": 3}, "has to be 4 or 8"),
        ({"max_seq_length": 5, "cutoff_len": 6}, "max_seq_length and cutoff_len both set data.max_length, to 5 and to 6"),
        ({"packing": True, "group_by_length": True}, "packing and group_by_length both set data.packing, to true and to group"),
        ({"warmup_ratio": 10}, "warmup_ratio is 10"),
        ({"resume_from_checkpoint": "out/checkpoint-5"}, "resumes from its own newest checkpoint"),
        ({"datasets": [{"path": "x", "type": "chatml.intel"}]}, "the type of a data set is 'chatml.intel'"),
        ({"datasets": [{"path": "x", "type": {"field_instruction": "q", "no_input_format": "Q: {x}"}}]}, "write data.train: {path"),
        ({"datasets": [{"path": "x", "type": "chat_template", "roles_to_train": ["user"]}]}, "is {'user'}; write data.train_on"),
        ({"train_sampling_strategy": "sequential"}, "write data.shuffle: false"),
        ({"pref_loss": "simpo"}, "write objective: simpo"),
        ({"report_to": ["wandb", "tensorboard"]}, "nothing is sent to wandb; write report_to: tensorboard"),
        ({"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3}}, "optimizer is a torchtune group (_component_), which is flat"),
        ({"special_tokens": {"bos_token": "<s>"}}, "the tokenizer's own special tokens"),
        ({"reward_funcs": "format"}, "objective is sft; write objective: grpo, or leave it out"),
        ({"eval_steps": 0.1}, "there is nothing to evaluate on"),
        ({"xyzzy": 1, "fp16": True, "lora": {"r": "x"}}, "2 keys cannot be read:\n  xyzzy is not a key.\n  fp16 is a key of torch"),
        ({"optim_args": "nonsense"}, "optim_args is 'nonsense'"),
        ({"optim": "galore_adamw"}, "optim is 'galore_adamw'"),
    ],
)
def test_what_other_tools_say_that_cannot_be_done(given, says):
    with pytest.raises(ConfigError) as caught:
        load_config({"model": "m"} | given)
    assert says in str(caught.value)


def test_an_override_wins_over_an_alias_in_the_file():
    assert load_config({"model": "m", "max_seq_length": 512}, ["data.max_length=64"]).data.max_length == 64
    assert load_config({"model": "m", "data": {"max_length": 512}}, ["cutoff_len=64"]).data.max_length == 64


def test_other_tools_configs_load():
    axolotl = {
        "base_model": "m", "adapter": "qlora", "load_in_4bit": True, "datasets": [{"path": "a.jsonl", "type": "alpaca"}],
        "val_set_size": 0.05, "sequence_len": 2048, "sample_packing": True, "micro_batch_size": 2, "num_epochs": 1,
        "optimizer": "adamw_torch_fused", "lr_scheduler": "cosine", "learning_rate": 2e-4, "warmup_ratio": 0.1, "bf16": "auto",
        "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True, "flash_attention": True, "deepspeed": None,
        "lora_target_modules": None,
        "model_type": "LlamaForCausalLM", "pad_to_sequence_len": True, "wandb_project": None, "tf32": False,
        "early_stopping_patience": None,
        "resume_from_checkpoint": None, "fsdp": None, "strict": False, "group_by_length": False, "gradient_checkpointing": True,
    }  # fmt: skip
    config = load_config(axolotl)
    assert (config.method, config.quantization, config.lora.r, config.data.max_length) == ("qlora", "nf4", 32, 2048)
    assert config.data.train == (Source(path="a.jsonl", format="alpaca"),) and config.eval_strategy == "epoch"
    llama_factory = {
        "model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora", "lora_target": "q_proj,v_proj", "dataset": "a.jsonl",
        "cutoff_len": 2048, "per_device_train_batch_size": 1, "bf16": True, "do_train": True, "overwrite_cache": True, "plot_loss": True,
        "preprocessing_num_workers": 16, "ddp_timeout": 180000000, "val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50,
        "optim_args": "b1=0.9", "resume_from_checkpoint": None,
    }  # fmt: skip
    config = load_config(llama_factory)
    assert config.lora.target_modules == ("q_proj", "v_proj") and config.dtype == "bfloat16" and not config.resume
    assert config.optim_args == (("b1", 0.9),)


def test_data_sets_of_other_tools_load():
    given = [
        {"path": "a", "type": "chat_template", "field_messages": "talk", "roles": {"user": ["u"]}, "train_on_eos": "turn"},
        {"path": "json", "ds_type": "json", "data_files": ["b", "c"], "type": {"field_instruction": "q", "field_output": "a"}},
        {"path": "d", "type": "chat_template.default", "field_messages": "talk", "split": "train[:9]"},
        {"path": "e", "columns": ["text"]}, "f",
    ]  # fmt: skip
    alpaca = {"format": "alpaca", "columns": (("instruction", "q"), ("output", "a"))}
    assert load_config({"model": "m", "datasets": given}).data.train == (
        Source(path="a", format="messages", columns=(("messages", "talk"),)), Source(path="b", **alpaca), Source(path="c", **alpaca),
        Source(path="d", format="preference", columns=(("prompt", "talk"),), split="train[:9]"),
        Source(path="e", columns=(("text", "text"),)), Source(path="f"),
    )  # fmt: skip
    assert load_config({"model": "m", "dataset": "a,b"}).data.train == (Source(path="a"), Source(path="b"))


def test_groups_of_other_tools_are_flat_and_an_empty_key_is_its_default(caplog):
    config = load_config({"model": "m", "rl": "grpo", "trl": {"reward_funcs": ["f1"], "beta": 0.1}, "seed": None})
    assert (config.beta, config.reward_funcs, config.seed) == (0.1, ("f1",), 42) and "trl.beta is read as beta" in caplog.text
    assert load_config({"model": "m", "lora": {"lora_r": 4}, "data": {"max_seq_length": 9}}, ["lora.r=null"]).lora.r == 16
    assert "lora.r is empty, so its default is used: 16" in caplog.text and "temperature" not in caplog.text
    assert load_config({"model": "m", "lora_alpha": None, "lora": {"r": None}, "lora_r": 4, "save_total_limit": None}).lora.r == 4
    assert "lora.lora_alpha is empty, so its default is used: 32" in caplog.text and "save_total_limit" not in caplog.text
    with pytest.raises(ConfigError, match="beta and trl.beta both set beta"):
        load_config({"model": "m", "beta": 0.2, "trl": {"beta": 0.1}})


def test_the_description_says_what_was_resolved_and_can_be_pasted_back():
    config = load_config(FULL)
    text = describe(config)
    assert "learning_rate=0.0002" in text and "quantization=nf4-dq" in text and "lora.rank_pattern={q_proj: 4}" in text
    assert " beta=" not in text and "lora." not in describe(load_config({"model": "m", "method": "full"}))
    words = [word for line in text.split("\n") for word in line.split("  ") if word]
    assert load_config({}, words) == config


def test_what_lora_cannot_combine():
    with pytest.raises(ConfigError, match="lora.lora_bias cannot be used with use_dora"):
        LoraConfig(lora_bias=True, use_dora=True)


def test_every_key_is_read_by_somebody():
    """A key that is accepted and then ignored is a lie. Keys of one objective are covered by its own tests."""
    root = Path(__file__).parents[2] / "jaxtune"
    readers = [path for path in root.rglob("*.py") if path.parent.name != "config"] + [root / "config" / "adapters.py"]  # has formulas
    source = "\n".join(path.read_text() for path in readers)
    own = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    keys = {path for path in PATHS if path not in own}
    assert {path for path in keys if not re.search(rf"""[.'"]{path.rpartition(".")[2]}\b""", source)} == set()


def test_every_key_of_the_schema_has_a_path():
    assert {field.name for field in dataclasses.fields(Config)} == {path.split(".")[0] for path in PATHS}


def test_overrides_change_a_config_that_is_read_already():
    config = load_config({"model": "m", "data": {"train": "x.jsonl"}, "output_dir": "o", "method": "lora"})
    assert load_config(config) is config
    changed = load_config(config, ["lora.r=3", "learning_rate=0.5"])
    assert (changed.lora.r, changed.learning_rate) == (3, 0.5) and config.lora.r != 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("max_steps=010", "max_steps", 10), ("max_steps=1_000", "max_steps", 1000), ("seed=0x10", "seed", 16),
        ("run_name=1:30", "run_name", "1:30"), ("run_name=None", "run_name", None), ("learning_rate=1E-5", "learning_rate", 1e-5),
    ],
)  # fmt: skip
def test_values_mean_what_they_look_like(override, key, value):
    assert getattr(load_config({"model": "m"}, [override]), key) == value


def test_a_beginning_that_is_not_offered_is_refused_at_once():
    with pytest.raises(ConfigError, match="lora.init_lora_weights='corda' is not supported; write true, gaussian, pissa"):
        load_config({"model": "m"}, ["lora.init_lora_weights=corda"])


def test_a_seed_that_is_too_large():
    with pytest.raises(ConfigError, match="data_seed is 9223372036854775808, but has to be below"):
        load_config({"model": "m", "data_seed": 2**63})


@pytest.mark.parametrize(("text", "said"), [("[" * 5000, "maximum recursion"), ("seed: " + "9" * 5000, "Exceeds the limit")])
def test_yaml_that_python_cannot_hold(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"c.yaml cannot be read: {said}"):
        load_config(tmp_path / "c.yaml")


def test_a_config_that_is_none():
    with pytest.raises(ConfigError, match="the config is None; give the path"):
        load_config(None)
