"""Patches of vLLM's workers: slots for edits beside the model, their operators in its graph, a slot for each token."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sealign.edits.edit import Edit
from sealign.errors import ServingError
from sealign.serving.edit_slots import EditSlots
from sealign.serving.patching import after, before
from sealign.serving.settings import REQUEST_KEY, SlotPlan

_slots: EditSlots | None = None
"""Slots of the model in this process; vLLM runs one model in a process."""


def edit_output(tokens: Tensor, module_index: int) -> None:
    """Edit a module's output in place; an operator that is one node of the compiled graph.

    Args:
        tokens: Output of the module, (t, d).
        module_index: Index of the module.
    """
    assert _slots is not None
    _slots.edit_output(module_index, tokens)


def edit_stream(hidden: Tensor, residual: Tensor, module_index: int) -> None:
    """Edit the residual stream, which vLLM carries as two summands, by changing the first in place.

    Args:
        hidden: First summand, (t, d).
        residual: Second summand, (t, d).
        module_index: Index of the decoder layer.
    """
    assert _slots is not None
    _slots.edit_stream(module_index, hidden, residual)


def register_operators() -> None:
    """Register the operators with torch; a second call does nothing."""
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "sealign_edit_output"):
        direct_register_custom_op(
            "sealign_edit_output", edit_output, mutates_args=["tokens"], fake_impl=lambda *_, **__: None
        )
        direct_register_custom_op(
            "sealign_edit_stream",
            edit_stream,
            mutates_args=["hidden"],
            fake_impl=lambda *_, **__: None,
        )


class EditWorker:
    """Methods that the front end calls in every worker; vLLM's ``--worker-extension-cls`` adds them to its worker."""

    def sealign_load_edit(self, folder: str) -> str:
        """Load an edit into a free slot, and return its hash.

        Args:
            folder: Folder of the edit.
        """
        return _existing_slots().load(Edit.from_pretrained(Path(folder)))

    def sealign_unload_edit(self, edit_hash: str) -> None:
        """Free the slot of an edit, if it is loaded.

        Args:
            edit_hash: Hash of the edit.
        """
        slots = _existing_slots()
        if edit_hash in slots.hashes:
            slots.unload(edit_hash)

    def sealign_lora_modules(self, adapter_id: int) -> list[str]:
        """Return the paths of the modules of this worker that a loaded LoRA has weights for.

        Args:
            adapter_id: vLLM's number of the LoRA.
        """
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        lora = manager.get_adapter(adapter_id)
        return [path for path in manager.modules if lora.get_lora(path) is not None]


def _existing_slots() -> EditSlots:
    if _slots is None:
        raise ServingError(
            "this server was started without slots for edits; restart it with the edit in --edit or in the folder of "
            "--edits-dir"
        )
    return _slots


def install_slots(model: nn.Module, config: Any, device: torch.device) -> None:
    """Create the slots of a model that is loaded and not yet compiled, and hook the operators to its modules.

    Args:
        model: vLLM's model.
        config: vLLM's ``VllmConfig``; without a ``SlotPlan`` in its ``additional_config`` the function does nothing.
        device: Device of the model.

    Raises:
        ServingError: A setting of vLLM would let tokens get the edit of another request, or the model lacks a module
            of the plan.
    """
    global _slots
    plan = SlotPlan.from_config(config.additional_config)
    if plan is None or not (plan.outputs or plan.streams):
        return
    check_config(config)
    outputs, streams = _matching(model, plan.outputs), _matching(model, plan.streams)
    tokens = max(
        config.scheduler_config.max_num_batched_tokens, *(config.compilation_config.cudagraph_capture_sizes or [0])
    )
    modules = [*outputs, *streams]
    width = config.model_config.get_hidden_size()
    slots = EditSlots(modules, width, max_tokens=tokens, sizes=plan.sizes, device=device)
    for index, path in enumerate(modules):
        hook = _output_hook(index) if path in outputs else _stream_hook(index)
        model.get_submodule(path).register_forward_hook(hook)
    _slots = slots


def check_config(config: Any) -> None:
    """Raise if a setting of vLLM makes the rows of a batch differ from the tokens of its requests in order.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        ServingError: There is such a setting.
    """
    parallel = config.parallel_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "micro-batches": parallel.use_ubatching,
        "context parallelism": parallel.prefill_context_parallel_size > 1,
        "more than one data-parallel engine": parallel.data_parallel_size > 1,
    }
    found = [name for name, on in refused.items() if on]
    if found:
        raise ServingError(
            f"edits that are not LoRAs cannot be served with {found[0]}, which reorders the tokens of requests; "
            "switch it off, or serve only edits that are exactly LoRAs"
        )


def _matching(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Return the paths of the modules that match, by layer; layers on other ranks of a pipeline are left out."""
    from vllm.model_executor.models.utils import PPMissingLayer

    found = []
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
        present = [
            (int(match.group(1)), path)
            for path, module in model.named_modules()
            if (match := expression.fullmatch(path)) and not isinstance(module, PPMissingLayer)
        ]
        if not present:
            raise ServingError(
                f"the served {type(model).__name__} has no module '{pattern}', which an edit needs; serve the model "
                "that the edit was fitted on"
            )
        found += [path for _, path in sorted(present)]
    return found


def _output_hook(module_index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        torch.ops.vllm.sealign_edit_output(output[0] if isinstance(output, tuple) else output, module_index)

    return hook


def _stream_hook(module_index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden, residual = output
        torch.ops.vllm.sealign_edit_stream(hidden, residual, module_index)

    return hook


def patch_runners() -> None:
    """Patch vLLM's model runners to create slots when a model is loaded, and to select the slots of every batch."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner

    for runner in (FirstRunner, CPUModelRunner, SecondRunner):
        if "load_model" in vars(runner):
            after(runner, "load_model", lambda self, *_: install_slots(self.model, self.vllm_config, self.device))
        if "_dummy_run" in vars(runner):
            before(runner, "_dummy_run", _select_none)
    scheduled = ("scheduler_output",)
    after(FirstRunner, "_prepare_inputs", _select_first, parameters=(*scheduled, "num_scheduled_tokens"))
    after(SecondRunner, "prepare_inputs", _select_second, parameters=scheduled)
    after(SecondRunner, "add_requests", _remember, parameters=scheduled)
    after(SecondRunner, "finish_requests", _forget, parameters=scheduled)


def _select_none(_runner: Any, *_: Any) -> None:
    if _slots is not None:
        _slots.select_none()


def edit_hash_of(params: Any) -> str | None:
    """Return the hash of a request's edit, which the front end put into its sampling parameters, or None.

    Args:
        params: Sampling parameters of the request.
    """
    return (getattr(params, "extra_args", None) or {}).get(REQUEST_KEY)


def _select_first(runner: Any, _result: Any, _scheduled: Any, counts: Any, *_: Any) -> None:
    if _slots is not None:
        ids = runner.input_batch.req_ids[: runner.input_batch.num_reqs]
        edits = [edit_hash_of(runner.requests[request].sampling_params) for request in ids]
        _slots.select([(edit, int(count)) for edit, count in zip(edits, counts, strict=True)])


def _select_second(runner: Any, batch: Any, *_: Any) -> None:
    if _slots is not None:
        edits = _edits_of(runner)
        counts = batch.num_scheduled_tokens
        _slots.select([(edits.get(name), int(n)) for name, n in zip(batch.req_ids, counts, strict=True)])


def _remember(runner: Any, _result: Any, scheduled: Any) -> None:
    for request in scheduled.scheduled_new_reqs:
        edit = edit_hash_of(request.sampling_params)
        if edit is not None:
            _edits_of(runner)[request.req_id] = edit


def _forget(runner: Any, _result: Any, scheduled: Any) -> None:
    for request in scheduled.finished_req_ids:
        _edits_of(runner).pop(request, None)


def _edits_of(runner: Any) -> dict[str, str]:
    if not hasattr(runner, "_sealign_edits"):
        runner._sealign_edits = {}
    return runner._sealign_edits  # type: ignore[no-any-return]
