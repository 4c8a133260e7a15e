"""Exports of edits to LoRA adapters, merged checkpoints and GGUF files, and the check that they equal the hooks."""
