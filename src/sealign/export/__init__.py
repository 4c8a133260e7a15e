"""Exports of edits to LoRA adapters, merged checkpoints and GGUF files, and the check that they equal the hooks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
