"""Generation, piece by piece: prompts to tokens (prompts), tokens to tokens (decode, sampling), tokens to text (answer)."""
