"""LoRA adapters, and adapter files in the format of PEFT."""
