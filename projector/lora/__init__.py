"""A PEFT LoRA adapter as a source of task vectors."""
