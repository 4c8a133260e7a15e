"""In vLLM's workers: the edit bank beside the model, its operator in the model's graph, and a slot for each token."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sealign.edits.edit import Edit
from sealign.errors import ServingError
from sealign.serving.edit_bank import EditBank
from sealign.serving.settings import REQUEST_KEY, BankPlan

_bank: EditBank | None = None
"""Of the model in this process: vLLM runs one model a process."""


def edit_output(tokens: Tensor, site: int) -> None:
    """Edit a module's output in place; the operator that stays one node of the compiled graph."""
    assert _bank is not None
    _bank.edit(site, tokens)


def edit_stream(hidden: Tensor, residual: Tensor, site: int) -> None:
    """Edit the residual stream, which vLLM carries as two summands, by changing the first in place."""
    assert _bank is not None
    _bank.edit_stream(site, hidden, residual)


def register_operators() -> None:
    """Make the operators known to torch, once a process."""
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "sealign_edit_output"):
        direct_register_custom_op(
            "sealign_edit_output", edit_output, mutates_args=["tokens"], fake_impl=lambda tokens, site: None
        )
        direct_register_custom_op(
            "sealign_edit_stream",
            edit_stream,
            mutates_args=["hidden"],
            fake_impl=lambda hidden, residual, site: None,
        )


class EditWorker:
    """The calls that the front end makes to every worker, added to vLLM's worker class by its own option."""

    def sealign_load_edit(self, folder: str) -> str:
        """Load an edit from a folder into a free slot, and return its hash."""
        return _bank_here().load(Edit.from_pretrained(Path(folder)))

    def sealign_unload_edit(self, edit_hash: str) -> None:
        """Free an edit's slot, if it has one here."""
        bank = _bank_here()
        if edit_hash in bank.hashes:
            bank.unload(edit_hash)


def _bank_here() -> EditBank:
    if _bank is None:
        raise ServingError("this server was started without places for edits; start it with sealign serve")
    return _bank


def install_bank(model: nn.Module, config: Any, device: torch.device) -> None:
    """Make the bank of a model that has been loaded and not yet compiled, and put the operators on its modules.

    Args:
        model: vLLM's.
        config: vLLM's ``VllmConfig``; without a plan of ours in its ``additional_config`` nothing is done.
        device: of the model.

    Raises:
        ServingError: a part of vLLM is switched on with which tokens could get another request's edit, or the model
            has no module of the plan.
    """
    global _bank
    plan = BankPlan.from_config(config.additional_config)
    if plan is None or not (plan.outputs or plan.streams):
        return
    check_config(config)
    outputs, streams = _matching(model, plan.outputs), _matching(model, plan.streams)
    tokens = max(
        config.scheduler_config.max_num_batched_tokens, *(config.compilation_config.cudagraph_capture_sizes or [0])
    )
    modules = [*outputs, *streams]
    bank = EditBank(modules, config.model_config.get_hidden_size(), tokens, plan.size, device)
    for site, path in enumerate(modules):
        hook = _output_hook(site) if path in outputs else _stream_hook(site)
        model.get_submodule(path).register_forward_hook(hook)
    _bank = bank


def check_config(config: Any) -> None:
    """Raise where vLLM is set up so that rows of a batch are not the tokens of its requests in order.

    Raises:
        ServingError: names the setting.
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
            f"edits that are not LoRAs cannot be served with {found[0]}, which moves tokens among requests; "
            "switch it off, or serve edits fitted with --normalization none and without --centered"
        )


def _matching(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Paths of the model's own modules that fit, by layer; layers on other ranks of a pipeline are not here."""
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
                f"the served {type(model).__name__} has no module '{pattern}', which the edits edit; serve the model "
                "that they were fitted on"
            )
        found += [path for _, path in sorted(present)]
    return found


def _output_hook(site: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        torch.ops.vllm.sealign_edit_output(output[0] if isinstance(output, tuple) else output, site)

    return hook


def _stream_hook(site: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden, residual = output
        torch.ops.vllm.sealign_edit_stream(hidden, residual, site)

    return hook


def patch_runners() -> None:
    """Let vLLM's model runners make the bank when they load a model, and fill its slots for every batch."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner

    for runner in (FirstRunner, CPUModelRunner, SecondRunner):
        if "load_model" in vars(runner):
            _after(runner, "load_model", lambda self, *_: install_bank(self.model, self.vllm_config, self.device))
        if "_dummy_run" in vars(runner):
            _before(runner, "_dummy_run", _choose_none)
    _after(FirstRunner, "_prepare_inputs", _choose_first)
    _after(SecondRunner, "prepare_inputs", _choose_second)
    _after(SecondRunner, "add_requests", _remember)
    _after(SecondRunner, "finish_requests", _forget)


def _choose_none(_runner: Any, *_: Any) -> None:
    if _bank is not None:
        _bank.choose_none()


def edit_of(params: Any) -> str | None:
    """The hash of the edit in a request's sampling parameters, which the front end put there."""
    return (getattr(params, "extra_args", None) or {}).get(REQUEST_KEY)


def _choose_first(runner: Any, _result: Any, scheduled: Any, counts: Any, *_: Any) -> None:
    if _bank is not None:
        ids = runner.input_batch.req_ids[: runner.input_batch.num_reqs]
        edits = [edit_of(runner.requests[request].sampling_params) for request in ids]
        _bank.choose([(edit, int(count)) for edit, count in zip(edits, counts, strict=True)])


def _choose_second(runner: Any, batch: Any, *_: Any) -> None:
    if _bank is not None:
        edits = _edits_of(runner)
        counts = batch.num_scheduled_tokens
        _bank.choose([(edits.get(name), int(n)) for name, n in zip(batch.req_ids, counts, strict=True)])


def _remember(runner: Any, _result: Any, scheduled: Any) -> None:
    for request in scheduled.scheduled_new_reqs:
        edit = edit_of(request.sampling_params)
        if edit is not None:
            _edits_of(runner)[request.req_id] = edit


def _forget(runner: Any, _result: Any, scheduled: Any) -> None:
    for request in scheduled.finished_req_ids:
        _edits_of(runner).pop(request, None)


def _edits_of(runner: Any) -> dict[str, str]:
    if not hasattr(runner, "_sealign_edits"):
        runner._sealign_edits = {}
    return runner._sealign_edits  # type: ignore[no-any-return]


def _after(owner: type, name: str, action: Callable[..., Any]) -> None:
    """Let a method do one thing more when it is done: ``action(self, result, *args)``."""

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            action(self, result, *args)
            return result

        return call

    _wrap(owner, name, around)


def _before(owner: type, name: str, action: Callable[..., Any]) -> None:
    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            action(self, *args)
            return method(self, *args, **kwargs)

        return call

    _wrap(owner, name, around)


def _wrap(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by one around it, once: vLLM may load plug-ins again in a process."""
    method = vars(owner)[name]
    if not hasattr(method, "_sealign"):
        wrapped = wraps(method)(around(method))
        wrapped._sealign = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)
