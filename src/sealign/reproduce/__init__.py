"""The tables and figures of the paper, reproduced for any model, and the demo."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
