import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config import load_config
from jaxtune.errors import ConfigError
from jaxtune.schedules import SCHEDULES, schedule


def config(**keys):
    return load_config({"model": "m"} | keys)


# transformers 5.23, total 20 steps, warm-up 4, learning rate 1: steps 0, 2, 4, 7, 12, 16, 19, 20 (tests/oracle has them all)
STEPS = [0, 2, 4, 7, 12, 16, 19, 20]
THEIRS = [
    ("linear", {}, [0, 0.5, 1, 0.8125, 0.5, 0.25, 0.0625, 0]),
    ("cosine", {}, [0, 0.5, 1, 0.9157348062, 0.5, 0.1464466094, 0.0096073598, 0]),
    ("cosine_with_restarts", {"num_cycles": 2}, [0, 0.5, 1, 0.6913417162, 1, 0.5, 0.0380602337, 0]),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2}, [0, 0.5, 1, 0.9325878450, 0.6, 0.3171572875, 0.2076858878, 0.2]),
    (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.2, "warmup_lr_rate": 0.4},
        [0.4, 0.8, 0.9923141122, 0.8828427125, 0.5219638712, 0.2674121551, 0.2, 0.2076858878],
    ),
    ("constant_with_warmup", {}, [0, 0.5, 1, 1, 1, 1, 1, 1]),
    ("polynomial", {"lr_end": 0.5, "power": 2}, [0, 0.5, 1, 0.830078125, 0.625, 0.53125, 0.501953125, 0.5]),
    ("inverse_sqrt", {}, [0, 0.5, 1, 0.7559289460, 0.5773502692, 0.5, 0.4588314677, 0.4472135955]),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 8, "decay_type": "linear", "min_lr_ratio": 0.1},
        [0.1, 0.55, 1, 1, 1, 0.55, 0.2125, 0.1],
    ),
    ("warmup_stable_decay", {"num_decay_steps": 0.4, "decay_type": "1-sqrt"}, [0, 0.5, 1, 1, 1, 0.2928932188, 0.0645856533, 0]),
]


@pytest.mark.parametrize(("name", "kwargs", "theirs"), THEIRS)
def test_schedules_are_transformers(name, kwargs, theirs):
    ours = schedule(config(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=4, learning_rate=1.0), 20)
    assert [ours(step) for step in STEPS] == pytest.approx(theirs, abs=1e-9)
    np.testing.assert_array_equal(jax.jit(jax.vmap(ours))(jnp.asarray(STEPS)), np.float32([ours(step) for step in STEPS]))


def test_the_table_above_covers_every_schedule():
    assert {name for name, _, _ in THEIRS} | {"constant"} == set(SCHEDULES)


def test_a_schedule_stays_where_it_ended():
    ours = schedule(config(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-5}, learning_rate=1e-4), 10)
    assert ours(10) == ours(11) == pytest.approx(1e-5)
    assert float(ours(jnp.int32(99))) == np.float32(1e-5)


def test_warmup_may_be_a_share():
    assert schedule(config(lr_scheduler_type="linear", warmup_ratio=0.1, learning_rate=1.0), 101)(11) == 1.0


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("cosine", {"min_lr": 0.1}, "lr_scheduler_kwargs of cosine cannot hold min_lr; it takes num_cycles"),
        ("linear", {"power": 2}, "it takes no keys"),
        ("cosine", {"num_cycles": "many"}, "num_cycles in lr_scheduler_kwargs of cosine is 'many'"),
        ("cosine_with_min_lr", {}, "needs lr_scheduler_kwargs: {min_lr: RATE}"),
        ("polynomial", {"lr_end": 1.0}, "has to be below the learning rate"),
        ("warmup_stable_decay", {"num_decay_steps": 30}, "the run has only 20"),
        ("warmup_stable_decay", {"decay_type": "fast"}, "'fast' is not known"),
    ],
)
def test_schedule_keys_are_checked(name, kwargs, says):
    with pytest.raises(ConfigError) as caught:
        schedule(config(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs), 20)
    assert says in str(caught.value)
