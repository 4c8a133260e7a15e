"""Edits: the record, the edit of a layer and its operator, files, attaching to a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
