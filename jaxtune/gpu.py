"""How much of a GPU's memory programs may use."""

import os

GRANTED = 0.9  # the rest is for the CUDA context, library workspaces and NCCL buffers, which a program's bytes do not include
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def grant_memory() -> None:
    """Let programs use `GRANTED` of each GPU's memory unless the environment sets a fraction; call it before the first device is used.

    JAX's own default is three quarters (docs.jax.dev, "GPU memory allocation"), so a step that fits the card could still run out of memory.
    """
    if not any(os.environ.get(name) for name in _FRACTIONS):
        os.environ[_FRACTIONS[0]] = str(GRANTED)
