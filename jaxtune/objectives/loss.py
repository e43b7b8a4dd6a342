"""What an objective returns."""

from typing import NamedTuple

import jax


class Loss(NamedTuple):
    """Sums and weights, never means, so accumulation, devices and packing cannot change the result.

    The loss is `total / weight`, and each metric `sum / weight`, once everything has been added up.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
