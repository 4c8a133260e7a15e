"""Functions that run in turns: each in a thread of its own, one at a time, changing after every token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch


def alternate(
    functions: Mapping[str, Callable[[Callable[[], None]], None]],
    *,
    before_turn: Callable[[str], None],
    device: torch.device,
) -> None:
    """Run functions in turns until all have returned or one has raised.

    ``generate`` of transformers cannot be suspended, but the thread in which it runs can. A function gives its turn to
    the next one by calling ``pause``. Each has random numbers of its own: torch's generators are saved and restored
    with the turns, and are at the end what they were before.

    Args:
        functions: Mapping from name to a function of ``pause``, in the order of the turns.
        before_turn: Function of a name that is called at the beginning of each of its turns.
        device: Device on which random numbers are drawn, beside the CPU.

    Raises:
        BaseException: The error of the function that failed first; the others end at their next ``pause``.
    """
    turns = _Turns(list(functions))
    errors: list[BaseException] = []

    def run(name: str, function: Callable[[Callable[[], None]], None]) -> None:
        random = _RandomState(device)

        def begin() -> None:
            turns.wait(name)
            if errors:
                raise _Abandoned
            random.restore()
            before_turn(name)

        def pause() -> None:
            random.save()
            turns.give(name)
            begin()

        try:
            begin()
            function(pause)
        except _Abandoned:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(name)

    before = _RandomState(device)
    threads = [threading.Thread(target=run, args=item, name=f"sealign-{item[0]}") for item in functions.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before.restore()
    if errors:
        raise errors[0]


class _Abandoned(Exception):  # noqa: N818 - ends a thread whose neighbour has failed
    pass


class _Turns:
    """Whose turn it is among several threads."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Wait for the turn of a thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._names[0] == name)

    def give(self, name: str) -> None:
        """End a turn."""
        with self._changed:
            self._names.remove(name)
            self._names.append(name)
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        """End the last turn of a thread, or the wait for it."""
        with self._changed:
            self._names.remove(name)
            self._changed.notify_all()


class _RandomState:
    """The state of torch's generators on the CPU and on a device."""

    def __init__(self, device: torch.device) -> None:
        self._generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch, ())]
        if device.type != "cpu":
            # Of the devices of a kind, each has a generator; there is only one MPS device.
            self._generators.append((torch.get_device_module(device), () if device.type == "mps" else (device,)))
        self.save()

    def save(self) -> None:
        self._states = [module.get_rng_state(*device) for module, device in self._generators]

    def restore(self) -> None:
        for (module, device), state in zip(self._generators, self._states, strict=True):
            module.set_rng_state(state, *device)
