"""Demonstrations: prompts with a positive and a negative completion, and their sources."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
