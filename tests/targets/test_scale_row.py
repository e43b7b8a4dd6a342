"""Collectives read from a serialised TPU program equal those of the same program printed (tools/hlo_proto.py reads what XLA cannot print).
"""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("libtpu")

from jaxtune.plan_targets import find_target


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    yield importlib.import_module("scale_row"), importlib.import_module("hlo_proto")
    for name in ("scale_row", "hlo_proto"):
        sys.modules.pop(name)


def test_a_serialised_program_has_the_collectives_that_are_printed(tools):
    scale_row, hlo_proto = tools
    devices = find_target("v5p-16").devices
    mesh = Mesh(np.array(devices), ("fsdp",))

    def lying(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def step(weights, head, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), lying("fsdp")), None

        return jnp.square(jax.lax.scan(layer, x, weights)[0] @ head).sum()

    weights = jax.ShapeDtypeStruct((4, 2048, 2048), jnp.bfloat16, sharding=lying(None, None, "fsdp"))
    head = jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16, sharding=lying("fsdp"))
    x = jax.ShapeDtypeStruct((64, 2048), jnp.bfloat16, sharding=lying("fsdp"))
    compiled = jax.jit(jax.grad(step, argnums=(0, 1))).lower(weights, head, x).compile()
    printed = scale_row.collectives(scale_row.from_text(compiled.as_text()))
    found = list(hlo_proto.instructions(compiled.runtime_executable().serialize(), "jit_step"))
    assert scale_row.collectives(found) == printed
    assert len(found) == sum(" = " in line for line in compiled.as_text().splitlines() if line.startswith("  "))
    assert printed["all-gather"][2] >= 2 and printed["all-gather"][0] >= 1  # in the loops over layers, and outside
    with pytest.raises(ValueError, match="no module jit_other"):
        list(hlo_proto.instructions(compiled.runtime_executable().serialize(), "jit_other"))
