"""What the workers refuse, and where they find the edit of a request; the rest is tested on a real server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sealign.errors import ServingError
from sealign.serving import worker
from sealign.serving.worker import EditWorker, check_config, edit_hash_of


def config(**changes: Any) -> SimpleNamespace:
    parallel = {"use_ubatching": False, "prefill_context_parallel_size": 1, "data_parallel_size": 1}
    speculative = changes.pop("speculative_config", None)
    return SimpleNamespace(speculative_config=speculative, parallel_config=SimpleNamespace(**parallel | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"use_ubatching": True}, "micro-batches"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"data_parallel_size": 2}, "more than one data-parallel engine"),
    ],
)
def test_settings_that_reorder_tokens_are_refused(changes: dict[str, Any], says: str) -> None:
    check_config(config())
    with pytest.raises(ServingError, match=f"cannot be served with {says}"):
        check_config(config(**changes))


def test_the_edit_of_a_request() -> None:
    assert edit_hash_of(SimpleNamespace(extra_args={"sealign_edit": "1" * 64})) == "1" * 64
    for without in (SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"other": 1}), None):
        assert edit_hash_of(without) is None


def test_a_server_without_slots_loads_no_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_slots", None)
    with pytest.raises(ServingError, match="without slots for edits"):
        EditWorker().sealign_unload_edit("1" * 64)
