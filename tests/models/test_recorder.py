"""What a recorder keeps against the modules' own outputs, and that it leaves no hook behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sealign.models.recorder import Recorder
from sealign.models.sites import ResolvedSite, resolve_sites
from tests.conftest import our_hooks


class _Pair(nn.Linear):
    """Puts out a tuple, as attention blocks do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x.sum()


class _First(nn.Module):
    def forward(self, pair: Any) -> Any:
        return pair[0]


class _Unhookable(nn.Linear):
    def register_forward_hook(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no hooks here")


def _stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 7), _Pair(7, 5), _First(), _Unhookable(5, 2))


def _sites(model: nn.Sequential, *layers: int) -> list[ResolvedSite]:
    return [ResolvedSite(layer, str(layer), model[layer]) for layer in layers]


def _keep(output: Tensor, _: int) -> Tensor:
    return output.detach().clone()


def test_plain_and_tuple_outputs() -> None:
    model, x = _stack(), torch.randn(4, 3)
    first = x @ model[0].weight.T + model[0].bias  # type: ignore[operator]
    second = first @ model[1].weight.T + model[1].bias  # type: ignore[operator]
    with Recorder(_sites(model, 1, 0), _keep) as recorder:
        model(x)
    assert sorted(recorder.recorded) == [0, 1]
    torch.testing.assert_close(recorder.recorded[0], first)
    torch.testing.assert_close(recorder.recorded[1], second)


@torch.no_grad()
def test_the_models_own_hidden_states(llama: Any) -> None:
    ids = torch.randint(4, 90, (2, 7))
    with Recorder(resolve_sites(llama, "residual", [0, 2]), _keep) as recorder:
        states = llama(input_ids=ids, output_hidden_states=True).hidden_states
    assert sorted(recorder.recorded) == [0, 2]
    for layer, kept in recorder.recorded.items():
        assert torch.equal(kept, states[layer + 1])


def test_what_is_kept_is_what_reduce_returns() -> None:
    model, x = _stack(), torch.randn(4, 3)
    seen: list[tuple[int, tuple[int, ...]]] = []

    def reduce(output: Tensor, layer: int) -> Tensor:
        seen.append((layer, tuple(output.shape)))
        return output[-1] * 10 ** (layer + 1)

    with Recorder(_sites(model, 0, 1), reduce) as recorder:
        model(x)
    assert seen == [(0, (4, 7)), (1, (4, 5))]
    torch.testing.assert_close(recorder.recorded[0], model[0](x)[-1] * 10)
    torch.testing.assert_close(recorder.recorded[1], model[1](model[0](x))[0][-1] * 100)


def test_recording_changes_no_output() -> None:
    model, x = _stack(), torch.randn(4, 3)
    before = model(x)
    with Recorder(_sites(model, 0, 1), lambda output, _: output * 0):
        assert torch.equal(model(x), before)


def test_a_later_output_replaces_an_earlier_one() -> None:
    model, early, late = _stack(), torch.randn(4, 3), torch.randn(6, 3)
    with Recorder(_sites(model, 0), _keep) as recorder:
        model(early)
        assert recorder.recorded[0].shape == (4, 7)
        model(late)
    assert torch.equal(recorder.recorded[0], model[0](late))


def test_hooks_are_there_within_and_gone_after() -> None:
    model, x = _stack(), torch.randn(4, 3)
    recorder = Recorder(_sites(model, 0, 1), _keep)
    assert our_hooks(model) == 0
    for _ in range(2):  # a recorder can be used again
        with recorder:
            assert our_hooks(model) == 2
        assert our_hooks(model) == 0
    model(x)
    assert recorder.recorded == {}


def test_hooks_are_gone_after_an_exception() -> None:
    model = _stack()
    with pytest.raises(RuntimeError, match="stop"), Recorder(_sites(model, 0, 1), _keep):
        raise RuntimeError("stop")
    assert our_hooks(model) == 0

    def failing(_output: Tensor, layer: int) -> Tensor:
        raise ValueError(f"layer {layer}")

    with pytest.raises(ValueError, match="layer 1"), Recorder(_sites(model, 1), failing):
        model(torch.randn(4, 3))
    assert our_hooks(model) == 0


def test_hooks_are_gone_if_one_cannot_be_set() -> None:
    model = _stack()
    with pytest.raises(RuntimeError, match="no hooks here"), Recorder(_sites(model, 0, 1, 3), _keep):
        pytest.fail("entered")
    assert our_hooks(model) == 0


def test_the_hooks_of_others_stay() -> None:
    model, calls = _stack(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    with Recorder(_sites(model, 0), _keep):
        pass
    model(torch.randn(4, 3))
    handle.remove()
    assert calls == [1]
