"""The model: what it is (families, spec), its leaves (weight, quant), and what it computes (decoder, attention, rope)."""
