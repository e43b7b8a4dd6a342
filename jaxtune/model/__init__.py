"""The model: its description (families, spec), its leaves (weight, quant), and its computation (decoder, attention, rope)."""
