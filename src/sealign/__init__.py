"""Sealign: activation edits of language models, from demonstrations to a served model.

The main steps:

    model, tokenizer = sealign.load_model("smollm2")
    demonstrations = sealign.load_demonstrations("bundled:truthfulness")
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(centered=True))
    with sealign.apply_edit(model, edit):
        model.generate(...)

Names are imported on first use, so that ``import sealign`` is fast.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
