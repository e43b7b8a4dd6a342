"""The parts of generation: prompts to tokens (prompts), tokens to tokens (decode, sampling), tokens to text (answer)."""
