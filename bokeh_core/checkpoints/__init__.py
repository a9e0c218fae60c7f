"""Checkpoint files: reading them without running them, loading them strictly, LoRA merging, base models."""
