"""ServedEdits: the edits of the server by name, and how many requests use each; part of the front end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from sealign.errors import ServingError, UnknownEditError
from sealign.serving.settings import REQUEST_KEY

Route = Literal["lora", "plugin"]
"""How an edit is served: as a LoRA adapter by vLLM itself, or in a slot by Sealign's plug-in."""


@dataclass(eq=False)
class ServedEdit:
    """An edit that requests can name.

    Attributes:
        name: Name of the edit in requests.
        hash: Hash of the edit.
        route: ``lora`` or ``plugin``.
        adapter: vLLM's ``LoRARequest`` that requests select by ``model``; of the plug-in's edits, one without weights.
        in_flight: Number of requests that use the edit now.
        compared_with: What the server's answers with the edit were compared with when it was loaded: the ``hooks``, or
            the server's ``base model``, from which they must differ; None where neither can be said.
        difference: Largest difference of a log-probability from the hooks, in nats.
    """

    name: str
    hash: str
    route: Route
    adapter: Any = None
    in_flight: int = 0
    compared_with: Literal["hooks", "base model"] | None = None
    difference: float | None = None
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    def begin_request(self) -> None:
        """Count a request that starts."""
        self.in_flight += 1
        self._idle.clear()

    def end_request(self) -> None:
        """Count a request that has ended."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    async def wait_until_idle(self) -> None:
        """Wait until no request uses the edit."""
        await self._idle.wait()


class ServedEdits:
    """The edits of the server by name. There is one instance in a process, used on one event loop."""

    def __init__(self) -> None:
        self._edits: dict[str, ServedEdit] = {}
        self._retired: dict[str, ServedEdit] = {}
        self._on_trial: dict[str, ServedEdit] = {}
        self._withdrawn: set[int] = set()  # vLLM numbers adapters, and never gives a number again

    @property
    def edits(self) -> list[ServedEdit]:
        """Edits that requests can name, sorted by name."""
        return [self._edits[name] for name in sorted(self._edits)]

    def add(self, edit: ServedEdit) -> None:
        """Let requests name an edit."""
        self._edits[edit.name] = edit

    @contextmanager
    def on_trial(self, edit: ServedEdit) -> Iterator[str]:
        """Let requests name an edit that is not served yet; a context manager that yields a name no client can guess.

        Args:
            edit: The edit, which the engine has loaded.
        """
        name = f"{edit.name} on trial {uuid4()}"
        self._on_trial[name] = edit
        try:
            yield name
        finally:
            del self._on_trial[name]

    def check_new(self, name: str, edit_hash: str) -> None:
        """Raise if a name or an edit is in use already, or is still used by requests after it was unloaded.

        Args:
            name: Name for a new edit.
            edit_hash: Hash of the new edit.

        Raises:
            ServingError: The name or the edit is in use.
        """
        if name in self._edits:
            raise ServingError(f"there is an edit '{name}' already; unload it first, or choose another name")
        for edit in (*self._edits.values(), *self._retired.values()):
            if edit.hash == edit_hash or edit.name == name:
                if edit.name in self._edits:
                    raise ServingError(f"this edit is loaded, as '{edit.name}'; use that name, or unload it first")
                raise ServingError(
                    f"the edit '{edit.name}' is being unloaded, after {edit.in_flight} running requests; wait, or "
                    "unload it again if the engine failed"
                )

    def retire(self, name: str) -> ServedEdit:
        """Refuse an edit to new requests, while running requests finish with it.

        Args:
            name: Name of the edit, which may be retired already.

        Raises:
            UnknownEditError: There is no edit of this name.
        """
        if name not in self._retired:
            self._retired[name] = self._find(name)
            del self._edits[name]
            if self._retired[name].adapter is not None:
                self._withdrawn.add(self._retired[name].adapter.lora_int_id)
        return self._retired[name]

    def serves(self, edit: ServedEdit) -> bool:
        """Return whether requests can name an edit, which is neither on trial nor retired."""
        return self._edits.get(edit.name) is edit

    def is_retired(self, edit: ServedEdit) -> bool:
        """Return whether an edit was retired and is not removed yet."""
        return self._retired.get(edit.name) is edit

    def remove(self, edit: ServedEdit) -> None:
        """Remove an edit that was retired and that no request uses any more."""
        self._retired.pop(edit.name, None)

    def resolve(self, extra_args: Mapping[str, Any] | None, adapter: Any) -> ServedEdit | None:
        """Return the edit that a request names, or None if it names none.

        Args:
            extra_args: The request's ``vllm_xargs``.
            adapter: vLLM's ``LoRARequest`` that the request's ``model`` selected, or None.

        Raises:
            UnknownEditError: There is no edit of the name, or the adapter is of an edit that was unloaded since the
                request began.
            ServingError: A key begins with ``sealign`` but is unknown, or the request names two edits. Such a request
                must not run, since its edit would do nothing.
        """
        ours = {key: value for key, value in (extra_args or {}).items() if key.lower().startswith("sealign")}
        unknown = [key for key in ours if key != REQUEST_KEY]
        if unknown:
            raise ServingError(f"vllm_xargs has the unknown key '{unknown[0]}'; name the edit as {REQUEST_KEY}")
        named = self._find(ours[REQUEST_KEY]) if ours else None
        if adapter is None:
            return named
        if named is not None and adapter.lora_name != named.name:
            raise ServingError(
                f"the request names the edit '{named.name}' and the model '{adapter.lora_name}'; name one of them"
            )
        if adapter.lora_int_id in self._withdrawn:
            raise UnknownEditError(f"the edit '{adapter.lora_name}' was unloaded; load it again, or name another")
        return self._edits.get(adapter.lora_name)

    def holds(self, edit_hash: str) -> bool:
        """Return whether an edit is loaded, or still used by running requests.

        Args:
            edit_hash: Hash of the edit.
        """
        known = (*self._edits.values(), *self._retired.values(), *self._on_trial.values())
        return any(edit.hash == edit_hash for edit in known)

    def _find(self, name: object) -> ServedEdit:
        found = self._edits.get(name, self._on_trial.get(name)) if isinstance(name, str) else None
        if found is None:
            listed = ", ".join(sorted(self._edits)) or "none"
            raise UnknownEditError(f"there is no edit {str(name)[:100]!r} on this server, which has: {listed}")
        return found


async def count_request(
    edit: ServedEdit, answers: AsyncGenerator[Any, None], count: Callable[[Any], None] = lambda _: None
) -> AsyncGenerator[Any, None]:
    """Yield the answers of a request, and count the request as a user of its edit until it ends.

    Args:
        edit: Edit of the request.
        answers: The engine's answers.
        count: Called with each answer.
    """
    edit.begin_request()
    try:
        async for answer in answers:
            count(answer)
            yield answer
    finally:
        await answers.aclose()
        edit.end_request()


SERVED = ServedEdits()
"""The edits of this process."""
