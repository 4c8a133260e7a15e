"""In the server's front end: which edits there are, what a request may ask for, and how many requests use each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sealign.errors import ServingError, UnknownEditError
from sealign.serving.settings import REQUEST_KEY

Route = Literal["lora", "plugin"]


@dataclass(eq=False)
class ServedEdit:
    """An edit that requests can name.

    Attributes:
        name: by which they name it.
        hash: of the edit.
        route: ``lora`` through vLLM's own adapters, ``plugin`` through the bank.
        adapter: vLLM's request of its adapter, where the route is ``lora``.
        in_flight: requests that use it now.
    """

    name: str
    hash: str
    route: Route
    adapter: Any = None
    in_flight: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    def take(self) -> None:
        """Count one more request."""
        self.in_flight += 1
        self._idle.clear()

    def give_back(self) -> None:
        """Count one request less."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request uses it."""
        await self._idle.wait()


class Registry:
    """The edits of this server. One runs in a process, on its one event loop."""

    def __init__(self) -> None:
        self._edits: dict[str, ServedEdit] = {}
        self._leaving: dict[str, ServedEdit] = {}

    @property
    def edits(self) -> list[ServedEdit]:
        """Those that requests can name, by name."""
        return [self._edits[name] for name in sorted(self._edits)]

    def add(self, edit: ServedEdit) -> None:
        """Let requests name an edit."""
        self._edits[edit.name] = edit

    def check_new(self, name: str, edit_hash: str) -> None:
        """Raise where an edit is there already, under its name or another, or is still leaving.

        Raises:
            ServingError: says which.
        """
        if name in self._edits:
            raise ServingError(f"there is an edit '{name}' already; unload it first, or choose another name")
        for edit in (*self._edits.values(), *self._leaving.values()):
            if edit.hash == edit_hash or edit.name == name:
                state = "loaded" if edit.name in self._edits else "still used by requests that run"
                raise ServingError(f"this edit is {state}, as '{edit.name}'; use that name, or unload it first")

    def retire(self, name: str) -> ServedEdit:
        """Refuse an edit to new requests, while those that run go on with it.

        Raises:
            UnknownEditError: there is no such edit.
        """
        edit = self._find(name)
        self._leaving[name] = self._edits.pop(name)
        return edit

    def forget(self, edit: ServedEdit) -> None:
        """Drop an edit that was retired and that no request uses any more."""
        self._leaving.pop(edit.name, None)

    def resolve(self, extra_args: Mapping[str, Any] | None, adapter_name: str | None) -> ServedEdit | None:
        """Return the edit that a request asks for, None if it asks for none.

        Args:
            extra_args: the request's ``vllm_xargs``.
            adapter_name: the LoRA that the request's ``model`` selected.

        Raises:
            UnknownEditError: an edit that is not there.
            ServingError: a key that looks like ours and is not, or two edits at once. Neither request may run, since
                its edit would silently do nothing.
        """
        ours = {key: value for key, value in (extra_args or {}).items() if key.lower().startswith("sealign")}
        unknown = [key for key in ours if key != REQUEST_KEY]
        if unknown:
            raise ServingError(
                f"vllm_xargs has '{unknown[0]}', which is no key of ours; name the edit as {REQUEST_KEY}"
            )
        named = self._find(ours[REQUEST_KEY]) if ours else None
        adapted = self._edits.get(adapter_name) if adapter_name else None
        if named is not None and adapter_name not in (None, named.name):
            raise ServingError(
                f"the request names the edit '{named.name}' and the model '{adapter_name}'; name one of them"
            )
        return named or adapted

    def holds(self, edit_hash: str) -> bool:
        """Whether an edit with this hash is loaded, or still used."""
        return any(edit.hash == edit_hash for edit in (*self._edits.values(), *self._leaving.values()))

    def _find(self, name: object) -> ServedEdit:
        found = self._edits.get(name) if isinstance(name, str) else None
        if found is None:
            listed = ", ".join(sorted(self._edits)) or "none"
            raise UnknownEditError(f"there is no edit {str(name)[:100]!r} on this server, which has: {listed}")
        return found


async def held(edit: ServedEdit, answers: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Pass a request's answers on, counting the request as using the edit for as long as it runs."""
    edit.take()
    try:
        async for answer in answers:
            yield answer
    finally:
        await answers.aclose()
        edit.give_back()


registry = Registry()
"""Of this process."""
