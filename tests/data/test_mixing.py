import collections
import json

import numpy as np
import pytest

from jaxtune import data
from jaxtune.data.mixing import Mixture
from jaxtune.data.packing import MAX_SHAPES
from jaxtune.errors import ConfigError

SIZES = {"a": 40, "b": 10}


@pytest.fixture
def sources(tmp_path):
    """Files of 40 and 10 rows, and one of general data."""
    paths = {}
    for name, size in (SIZES | {"general": 30}).items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name} {n}: ", "completion": "yes"}) + "\n" for n in range(size)))
        paths[name] = str(path)
    return paths


def counts(source, epochs=1):
    """How often each row of each source occurs in each epoch."""
    found = []
    for epoch in range(epochs):
        seen = collections.Counter()
        for step in range(source.steps_per_epoch):
            rows = source._epoch(epoch)[step]
            seen.update((int(source.documents.part[d]), int(source.documents.rows[d])) for d in source.plan.docs[rows[rows >= 0]])
        found.append(seen)
    return found


def mixed(config, tokenizers, sources, top=None, weights=(None, None), **keys):
    train = [{"path": sources[name], "weight": weight} for name, weight in zip(SIZES, weights, strict=True)]
    return data.load(config(train, top, packing=False, **keys), tokenizers["chatml"]).train


def by_source(seen):
    return [sum(count for (part, _), count in seen.items() if part == number) for number in range(3)]


def test_without_weights_every_row_comes_once(config, tokenizers, sources):
    (seen,) = counts(mixed(config, tokenizers, sources))
    assert len(seen) == 50 and set(seen.values()) == {1}


def test_weights_are_shares_and_the_small_source_repeats(config, tokenizers, sources):
    source = mixed(config, tokenizers, sources, weights=(1, 1))
    for seen in counts(source, 3):
        assert by_source(seen) == [40, 40, 0]
        assert {count for (part, _), count in seen.items() if part == 1} == {4}
    assert source.tokens == sum(source.documents.lengths[source.plan.docs[row]] for row in source._epoch(0).ravel() if row >= 0)


def test_stop_at_the_first_takes_other_rows_each_epoch(config, tokenizers, sources):
    source = mixed(config, tokenizers, sources, weights=(1, 1), mix_stop="first")
    epochs = counts(source, 4)
    assert all(by_source(seen) == [10, 10, 0] for seen in epochs)
    together = sum(epochs, collections.Counter())
    assert {count for (part, _), count in together.items() if part == 0} == {1}, "four epochs of 10 see each of the 40 rows once"


def test_temperature_flattens(config, tokenizers, sources):
    (seen,) = counts(mixed(config, tokenizers, sources, temperature=2.0))
    assert by_source(seen) == [40, 20, 0]


def test_replay_is_a_share_of_all_rows(config, tokenizers, sources):
    (seen,) = counts(mixed(config, tokenizers, sources, replay={"path": sources["general"], "weight": 0.2}))
    assert by_source(seen) == [40, 10, 12]


def test_limit_keeps_its_rows_when_others_are_added(config, tokenizers, sources):
    train = [{"path": sources["a"], "limit": 7}]
    few = data.load(config(train), tokenizers["chatml"]).train.documents
    assert len(few) == 7 and sorted(few.rows) == list(few.rows)


def test_a_step_of_a_far_epoch_is_a_pure_function(config, tokenizers, sources):
    one, two = (mixed(config, tokenizers, sources, weights=(3, 1)) for _ in range(2))
    for step in (0, 7, 100_003):
        assert (one.batch_at(step).tokens == two.batch_at(step).tokens).all()


def test_rows_grouped_by_length_keep_to_the_mixture(config, tokenizers, tmp_path):
    """Quotas are exact in every epoch, each has the same number of steps, and no epoch needs its own shape."""
    paths = []
    for name, size in (("a", 60), ("b", 25)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": f"{name} {n}: ", "completion": "yes " * (n * n % 121)}) + "\n" for n in range(1, size))
        )
        paths.append(str(path))
    train = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 2), strict=True)]
    top = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    source = data.load(config(train, top, packing="group", max_length=1024, mix_stop="first"), tokenizers["chatml"]).train
    assert len(source.plan.lengths) > 2
    together, shapes = collections.Counter(), set()
    for epoch, seen in enumerate(counts(source, 6)):
        assert by_source(seen) == [12, 24, 0]
        together += seen
        for step in range(source.steps_per_epoch):
            batch = source.batch_at(epoch * source.steps_per_epoch + step)
            shapes.add((batch.tokens.shape, batch.capacity))
            longest = (batch.segments > 0).sum(-1).max()
            assert longest <= batch.tokens.shape[-1] and (batch.weights > 0).sum(-1).max() <= batch.capacity
    assert len(together) == 59 + 24, "every row of every length has its turn"
    assert 1 < len(shapes) <= MAX_SHAPES


def test_unshuffled_sources_are_interleaved_evenly():
    mix = Mixture([np.arange(4), np.arange(4, 6)], [4, 2])
    assert mix.epoch(0, 0, shuffle=False).tolist() == [0, 4, 1, 2, 5, 3]


def test_mistakes(config, tokenizers, sources):
    with pytest.raises(ConfigError, match="data.temperature sets the shares"):
        mixed(config, tokenizers, sources, weights=(1, 1), temperature=2.0)
    with pytest.raises(ConfigError, match="data.replay.weight is 1, but"):
        mixed(config, tokenizers, sources, replay={"path": sources["general"], "weight": 1.0})
    with pytest.raises(ConfigError, match="the weight of .* is -1, but has to be above 0"):
        mixed(config, tokenizers, sources, weights=(1, -1))
