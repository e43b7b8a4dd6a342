"""Mamba-2 layers (model/mamba.py) as config.json describes them, and their rows."""

import math
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import ModelConfig
from jaxtune.model.families.parts import Rows, linear
from jaxtune.model.families.recurrent import Mamba
from jaxtune.model.row import Row


def mamba_of(hf: dict[str, Any], layers: tuple[int, ...], width: int, act: str, **more) -> Mamba:
    """The Mamba layers according to Granite 4.0's keys; their heads have `width` dimensions together."""
    heads, groups, limit = hf["mamba_n_heads"], hf["mamba_n_groups"], hf["time_step_limit"]
    size = width // heads if hf["mamba_d_head"] in (None, "auto") else hf["mamba_d_head"]
    if not isinstance(size, int) or size < 1 or heads * size != width:
        raise ModelError(f"mamba_n_heads={heads} of mamba_d_head={size!r} do not make {width}, the width of a Mamba layer")
    if heads % groups:
        raise ModelError(f"mamba_n_heads={heads} is not a multiple of mamba_n_groups={groups}")
    low, high = limit if len(limit) == 2 else (None, None)
    if low != 0 or high not in (math.inf, "Infinity", {"__float__": "Infinity"}):
        raise ModelError(f"time_step_limit={limit!r} is not implemented for {hf['model_type']}; only [0.0, Infinity] is")
    return Mamba(heads, size, groups, hf["mamba_d_state"], hf["mamba_d_conv"], bool(hf["mamba_conv_bias"]), layers, act, **more)


def mamba_rows(c: ModelConfig, m: Mamba, hf: str = "mamba") -> Rows:
    """The projection to gate, convolution and time steps, the convolution `[channels, 1, W]`, decay, skip, possibly a norm, the output
    projection."""
    into = m.width + m.channels + m.heads
    yield from linear("in_gudt", into, c.hidden_size, ("heads", "embed"), f"{hf}.in_proj", "ssm_in")
    yield "conv", Row((m.channels, 1, m.kernel), ("heads", None, None), "normal", f"{hf}.conv1d.weight", "ssm_conv1d.weight")
    if m.conv_bias:
        yield "conv_bias", Row((m.channels,), ("heads",), "zeros", f"{hf}.conv1d.bias", "ssm_conv1d.bias")
    yield "dt_bias", Row((m.heads,), ("heads",), "ones", f"{hf}.dt_bias", "ssm_dt.bias")
    yield "a_log", Row((m.heads,), ("heads",), "zeros", f"{hf}.A_log", "ssm_a")
    yield "skip", Row((m.heads,), ("heads",), "ones", f"{hf}.D", "ssm_d")
    if m.norm:
        yield "state_norm", Row((m.width,), ("heads",), "ones", f"{hf}.norm.weight", "ssm_norm.weight")
    yield from linear("out", c.hidden_size, m.width, ("embed", "heads"), f"{hf}.out_proj", "ssm_out", m.out_bias)
