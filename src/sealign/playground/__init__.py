"""The playground: conversations with edited models, in a terminal or on a local web page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
