import pytest

from jaxtune.config import interval, load_config
from jaxtune.errors import ConfigError

EVAL = {"data": {"eval": "e.jsonl"}}


def load(**keys):
    return load_config({"model": "m"} | keys)


@pytest.mark.parametrize(
    ("keys", "rate"),
    [({"method": "lora"}, 2e-4), ({"method": "qlora"}, 2e-4), ({"method": "full"}, 2e-5), ({"objective": "dpo"}, 1e-5),
     ({"method": "full", "objective": "dpo"}, 1e-6), ({"learning_rate": 3e-3}, 3e-3)],
)  # fmt: skip
def test_the_learning_rate_follows_method_and_objective(keys, rate):
    assert load(**keys).learning_rate == rate


def test_qlora_quantises_by_default_and_only_then():
    assert load(method="qlora").quantization == "nf4-dq"
    assert load(method="qlora", quantization="int8").quantization == "int8"
    assert load(method="lora").quantization is None


def test_naming_eval_data_is_asking_for_an_evaluation():
    assert load().eval_strategy == "no"
    assert load(**EVAL).eval_strategy == "epoch"
    assert load(**EVAL, eval_steps=7).eval_strategy == "steps"
    assert load(**EVAL, eval_strategy="steps").eval_steps == 10  # logging_steps, as in HF
    assert load(**EVAL, eval_strategy="no").eval_strategy == "no"


def test_metric_for_best_model():
    assert load(metric_for_best_model="loss").metric_for_best_model == "eval_loss"
    assert load().greater_is_better is False
    assert load(metric_for_best_model="exact_match").greater_is_better is True


def test_data_seed_is_seed_unless_given():
    assert load(seed=7).data_seed == 7
    assert load(seed=7, data_seed=3).data_seed == 3


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": ""}, "model is missing"),
        ({"method": "full", "quantization": "nf4"}, "write method: qlora"),
        ({"method": "full", "loraplus_lr_ratio": 16}, "method full has none"),
        ({"param_dtype": "bfloat16"}, "write method: full"),
        ({"method": "lora", "trainable_parameters": ["norm"]}, "write method: full, or of LoRA lora.modules_to_save"),
        ({"method": "full", "trainable_parameters": ["norm"], "optimizer_in_bwd": True}, "leave one of the two out"),
        ({"objective": "distill"}, "teacher is missing"),
        ({"objective": "distill", "teacher": "t", "beta": 1.5}, "from 0 (forward KL) to 1"),
        ({"objective": "distill", "teacher": "t", "kd_ratio": 0.0}, "objective: sft"),
        ({"objective": "distill", "teacher": "t", "temperature": 0.0}, "above 0"),
        ({"teacher": "t"}, "teacher is a key of objective distill"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"num_train_epochs": 0}, "nothing to train"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, but has to be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.03}, "write constant_with_warmup"),
        ({"adam_beta1": 1.0}, "below 1"),
        ({"lora": {"r": 0}}, "lora.r is 0"),
        ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout is 1.0"),
        ({"data": {"eval": 1.5}}, "data.eval is 1.5"),
        ({"data": {"eval": 0.0}}, "data.eval is 0.0, but has to be above 0"),
        ({"beta": 0.5}, "beta is a key of objective dpo"),
        ({"objective": "kto", "ld_alpha": 0.5}, "ld_alpha is a key of objective dpo"),
        ({"objective": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 losses"),
        ({"loss_type": "dtf"}, "loss_type dtf is not one of objective sft; did you mean dft?"),
        ({"objective": "reward", "loss_type": "sigmoid"}, "loss_type sigmoid is not one of objective reward; leave it out"),
        ({"objective": "dpo", "neftune_noise_alpha": 5}, "neftune_noise_alpha is a key of objective sft"),
        ({"eval_strategy": "steps"}, "nothing to evaluate on"),
        ({"eval_steps": 5}, "nothing to evaluate on"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs an evaluation"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs an evaluation"),
        ({"eval_on_start": True}, "eval_on_start needs an evaluation"),
        ({"save_strategy": "best"}, "save_strategy best needs an evaluation"),
        (EVAL | {"load_best_model_at_end": True}, "write save_strategy: epoch"),
        (EVAL | {"load_best_model_at_end": True, "eval_steps": 40, "save_steps": 100}, "a multiple of eval_steps"),
        ({"objective": "dpo", "data": {"length_policy": "split"}}, "which objective dpo cannot use"),
        ({"mesh": {"data": -1, "tensor": -1}}, "only one axis"),
        ({"mesh": {"fsdp": 0}}, "mesh.fsdp is 0"),
    ],
)
def test_what_does_not_go_together_is_refused(keys, says):
    with pytest.raises(ConfigError) as caught:
        load(**keys)
    assert says in str(caught.value)


def test_the_best_checkpoint_is_always_a_saved_one():
    assert load(**EVAL, load_best_model_at_end=True, eval_steps=50, save_steps=100)
    assert load(**EVAL, load_best_model_at_end=True, save_strategy="epoch")
    assert load(**EVAL, load_best_model_at_end=True, save_strategy="best")


def test_replace_checks_again():
    with pytest.raises(ConfigError, match="mesh.fsdp is 0"):
        load().replace(mesh={"fsdp": 0})


def test_an_interval_below_one_is_a_share_rounded_up():
    assert [interval(value, 101) for value in (10, 0.1, 0.5, 0)] == [10, 11, 51, 0]
