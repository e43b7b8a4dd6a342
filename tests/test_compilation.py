"""Compiled programs that a killed run has written incompletely to the cache are compiled again, and cached."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxtune.compilation import remove_damaged


@pytest.fixture
def cache(tmp_path):
    """An empty folder, in which jax caches every program."""
    keys = {
        "jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }  # fmt: skip
    before = {key: getattr(jax.config, key) for key in keys}

    def use(values):
        for key, value in values.items():
            jax.config.update(key, value)
        compilation_cache.reset_cache()

    use(keys)
    yield tmp_path
    use(before)


def compile_anew():
    """Compile a program that this process has not compiled, as far as it knows."""
    assert jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).shape == (4, 4)


@pytest.mark.parametrize("size", [0, 3, 100, -1])
def test_a_half_written_program_is_compiled_and_kept_again(cache, size):
    compile_anew()
    whole = {entry.name: entry.read_bytes() for entry in cache.glob("*-cache")}
    damaged = cache / next(name for name in whole if "lambda" in name)
    damaged.write_bytes(whole[damaged.name][:size])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        compile_anew()
    assert len(damaged.read_bytes()) < len(whole[damaged.name])  # jax leaves it there forever
    remove_damaged(cache)
    assert {entry.name for entry in cache.glob("*-cache")} == whole.keys() - {damaged.name}
    compile_anew()  # a warning is an error
    assert len(damaged.read_bytes()) > 100


def test_what_is_known_to_be_whole_is_not_read_again(cache):
    (cache / "jit_old-1-cache").write_bytes(b"")
    remove_damaged(cache)
    assert not list(cache.glob("*-cache"))
    old = cache / "jit_old-2-cache"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    remove_damaged(cache)
    assert old.exists()
    remove_damaged(cache / "missing")
