"""Paths and sizes of pytrees of nested dicts."""

from typing import Any

import jax
from flax import traverse_util


def flatten(tree: dict) -> dict[str, Any]:
    """Nested dict -> `{"layers/0/q": leaf}`; a `Weight` is one leaf."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def nbytes(tree) -> int:
    """Bytes of all arrays (or shapes) in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count(tree) -> int:
    """Number of elements in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


