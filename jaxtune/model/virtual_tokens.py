"""Virtual tokens before every document (prompt and prefix tuning): `params["virtual"]` holds their embeddings `[P, D]`, or a prefix `[P, L
* 2 * K * h]`, their keys and values in every layer.

They occur once, at the start of a row, in their own segment that every document sees (law 3: documents of a row do not affect each other,
and virtual tokens depend on no document). Documents then begin at position P. A prefix takes the places of P tokens of zeros.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.model.families import ModelConfig

SEGMENT = 2**30 - 1  # no document's


def count(params: Mapping) -> int:
    """P; 0 if there are none."""
    return next(iter(params["virtual"].values())).shape[0] if "virtual" in params else 0


def before(params: Mapping, x_BTD: jax.Array) -> jax.Array:
    """`[B, P + T, D]`: the virtual tokens' embeddings, then those of the row."""
    P, (B, _, D) = count(params), x_BTD.shape
    own = params["virtual"].get("embeddings")
    own = jnp.zeros((P, D), x_BTD.dtype) if own is None else own.astype(x_BTD.dtype)
    return jnp.concatenate([jnp.broadcast_to(own, (B, P, D)), x_BTD], axis=1)


def widened(params: Mapping, x_BT: jax.Array, first: jax.Array | int) -> jax.Array:
    """A per-token number of a row, `[B, P + T]`, with `first` for the virtual tokens."""
    P = count(params)
    return jnp.concatenate([jnp.broadcast_to(jnp.asarray(first, x_BT.dtype), (x_BT.shape[0], P)), x_BT], axis=1)


def with_prefix(config: ModelConfig, params: Mapping, stack: int) -> dict:
    """The weights of a stack, with `prefix [layers, 2, P, K, h]` if there is one."""
    weights = params["layers"][str(stack)]
    if "prefix" not in params.get("virtual", {}):
        return weights
    all_layers = params["virtual"]["prefix"].reshape(count(params), config.num_layers, 2, config.num_kv_heads, config.head_dim)
    return weights | {"prefix": all_layers[:, np.asarray(config.stacks[stack])].transpose(1, 2, 0, 3, 4)}


def put_in(prefix_2PKh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values with the first P tokens' replaced by the prefix."""
    P = prefix_2PKh.shape[1]

    def put(own, x):
        return jnp.concatenate([jnp.broadcast_to(own.astype(x.dtype), (x.shape[0], *own.shape)), x[:, P:]], axis=1)

    return put(prefix_2PKh[0], k_BTKh), put(prefix_2PKh[1], v_BTKh)
