"""Checks of compiled edits, run as a script: annotations that are checked at run time cannot be traced.

``compiled.py layers`` compiles the edits of single layers, ``compiled.py model MODEL EDIT`` a whole model.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import torch
from transformers import CompileConfig

import sealign
from sealign.edits.attach import edit_output
from sealign.edits.gate import Gate
from sealign.edits.handle import EditHandle
from sealign.edits.layer_edit import LayerEdit
from sealign.methods.sea import projection_edit
from sealign.spectral.feature_maps import FEATURE_MAPS
from sealign.spectral.projection import NORMALIZATIONS

WIDTH = 11
IDS = torch.tensor([[7, 31, 12, 55, 90, 23, 41, 8, 77]])


def check_layers() -> None:
    """One graph, forward and backward, in autocast too, for each feature map and rescaling, and with a gate."""
    torch.manual_seed(0)
    for feature_map in FEATURE_MAPS:
        for normalization in NORMALIZATIONS:
            factors = [torch.linalg.qr(torch.randn(WIDTH, k))[0] for k in (3, 2)]
            projection = sealign.Projection(*factors, torch.randn(WIDTH), feature_map)  # type: ignore[call-arg]
            edit, other = (projection_edit(projection, normalization=normalization) for _ in range(2))  # type: ignore[arg-type]
            check_layer(edit, other)
            if feature_map == "identity" and normalization != "feature":
                gate = Gate(torch.randn(WIDTH), 0.1)
                check_layer(dataclasses.replace(edit, gate=gate), dataclasses.replace(other, gate=gate))


def check_layer(edit: LayerEdit, other: LayerEdit) -> None:
    torch._dynamo.reset()
    edit.prepare(torch.device("cpu"), torch.float32)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    compiled = torch.compile(lambda x: edit(x @ weight, 0.7).square().sum(), fullgraph=True, backend="aot_eager")
    for rows in (2, 5):
        tokens = torch.randn(rows, WIDTH)
        expected = other(tokens @ weight, 0.7).square().sum()
        found = compiled(tokens)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(loss, weight)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(compiled(tokens), other(tokens @ weight, 0.7).square().sum())


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module(input_ids=IDS, use_cache=False).logits
    return found


def check_model(model_path: str, edit_path: str) -> None:
    """Compiled after attaching, a model is one graph that follows the handle."""
    model, _ = sealign.load_model(model_path, device="cpu")
    edit = sealign.Edit.from_pretrained(edit_path)
    base = logits(model)
    expected = {}
    for strength in (edit.strength, -0.3):
        with sealign.apply_edit(model, edit, strength=strength):
            expected[strength] = logits(model)
        assert not torch.allclose(base, expected[strength])
    with sealign.apply_edit(model, edit) as handle:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), expected[edit.strength])
        assert compiled is not model
        explained = torch._dynamo.explain(model)(input_ids=IDS, use_cache=False)
        assert explained.graph_break_count == 0, explained.break_reasons
        handle.set_strength(-0.3)
        torch.testing.assert_close(logits(compiled), expected[-0.3])
        handle.set_strength(0)
        torch.testing.assert_close(logits(compiled), base)
        handle.set_strength(edit.strength)
        with handle.switched(False):
            torch.testing.assert_close(logits(compiled), base)
        torch.testing.assert_close(logits(compiled), expected[edit.strength])
    torch.testing.assert_close(logits(compiled), base)  # the compiled graph is restored, too
    handle.switch(True)
    torch.testing.assert_close(logits(compiled), base)  # and stays so


def check_late(model_path: str, edit_path: str) -> None:
    """A model that was compiled before an edit is attached, swapped or detached follows it."""
    edit = sealign.Edit.from_pretrained(edit_path)
    for way in WAYS:
        torch._dynamo.reset()
        model, _ = sealign.load_model(model_path, device="cpu")
        base, expected = logits(model), {}
        for strength in (edit.strength, -0.3):
            with sealign.apply_edit(model, edit, strength=strength):
                expected[strength] = logits(model)
        run = WAYS[way](model)
        torch.testing.assert_close(logits(run), base)
        for strength, wanted in expected.items():
            with sealign.apply_edit(model, edit, strength=strength):
                torch.testing.assert_close(logits(run), wanted, msg=way)
            torch.testing.assert_close(logits(run), base, msg=way)


def by_layer(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    return model


def in_a_function(model: Any) -> Any:
    return torch.compile(lambda **given: model(**given), backend="eager", fullgraph=True)


def of_another_model(model: Any) -> Any:
    """The graph of a model with the same weights, which torch would use for this one."""
    torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)(input_ids=IDS, use_cache=False)
    return torch.compile(model, backend="eager", fullgraph=True)


WAYS = {"by layer": by_layer, "in a function": in_a_function, "of another model": of_another_model}


def check_static(model_path: str, edit_path: str) -> None:
    """What ``generate`` compiles for a static cache follows one edit after another, in decoding too."""
    torch._dynamo.reset()
    model, _ = sealign.load_model(model_path, device="cpu")
    edit = sealign.Edit.from_pretrained(edit_path)
    config: Any = CompileConfig(backend="eager")
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    base = decoded(model)
    torch.testing.assert_close(decoded(model, **static), base)
    for one in (edit, edit.with_layers(edit.layers[:1]), edit.reversed()):
        with sealign.apply_edit(model, one):
            wanted = decoded(model)
            assert not torch.allclose(wanted[1:], base[1:])
            torch.testing.assert_close(decoded(model, **static), wanted)
        torch.testing.assert_close(decoded(model, **static), base)


def decoded(model: Any, **settings: Any) -> torch.Tensor:
    """The logits of each step while one text is generated, whatever the model would choose."""

    def always(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([7]), 0)

    found = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=4,
        do_sample=False,
        logits_processor=[always],
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return torch.stack(found.logits)


def check_strengths(model_path: str, edit_path: str) -> None:
    """A change of the strength compiles nothing, and strength 0 is no edit to the bit."""
    torch._dynamo.reset()
    model, _ = sealign.load_model(model_path, device="cpu")
    base, graphs = logits(model), []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with sealign.apply_edit(model, sealign.Edit.from_pretrained(edit_path)) as handle:
        for strength in [*torch.linspace(-1.2, 1.2, 12).tolist(), 1.0, 0.0]:
            handle.set_strength(strength)
            torch.testing.assert_close(logits(compiled), logits(model))
        assert len(graphs) == 2  # with and without the edit
        assert torch.equal(logits(compiled), base)


class Quantised(torch.nn.Module):
    """A module whose first parameter is not of the type of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (x * 2).bfloat16(), None


def check_quantised() -> None:
    """A graph of a module whose weights do not show the type of its output has no break either."""
    edit = sealign.AffineEdit(torch.randn(WIDTH, 2), torch.randn(2, WIDTH), normalization="token")
    module = Quantised()

    class Strong:
        strength = 0.7

    edit_output(module, edit, EditHandle(Strong()))  # type: ignore[arg-type]
    tokens = torch.randn(3, WIDTH)
    found = torch.compile(module, backend="aot_eager", fullgraph=True)(tokens)[0]
    torch.testing.assert_close(found, edit((tokens * 2).bfloat16(), 0.7))


if __name__ == "__main__":
    if sys.argv[1] == "layers":
        check_layers()
        check_quantised()
    else:
        for check in (check_model, check_late, check_static, check_strengths):
            check(*sys.argv[2:])
