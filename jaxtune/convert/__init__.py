"""Everything that is read or written in other people's formats: Hugging Face, PEFT, bitsandbytes, GGUF."""
