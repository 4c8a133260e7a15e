"""An edit carried into weights: LoRA adapters and merged checkpoints, and the proof that they are equal."""
