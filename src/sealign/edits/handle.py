"""The handle of an edit that is attached to a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sealign.edits.strength import check_strength
from sealign.errors import SettingError
from sealign.models.hooks import add_hook

if TYPE_CHECKING:
    from sealign.edits.intervention import Intervention


class EditHandle:
    """An edit, or another intervention, that is attached to a model.

    Hooks read ``active`` and ``strength`` each time the model runs. A copy or a pickle of the model holds a copy of the
    handle, which is detached.

    Args:
        edit: Edit or other intervention.

    Attributes:
        edit: The edit.
        stack: Callbacks that detach it.
        active: Whether the edit changes anything: it is switched on and its strength is not 0.
        on_switch: Function of the new value of ``enabled`` that is called after each switch, for interventions that
            do not act through hooks.
    """

    def __init__(self, edit: Intervention) -> None:
        self.edit = edit
        self.stack: ExitStack = ExitStack()
        self.on_switch: Callable[[bool], None] | None = None
        self._enabled = True
        self._detached = False
        self._strength = edit.strength
        self._strengths: dict[tuple[torch.device, bool], Tensor] = {}
        self._update()

    @property
    def strength(self) -> float | None:
        """Current strength; None if the method has none."""
        return self._strength

    @property
    def enabled(self) -> bool:
        """Whether the edit is switched on."""
        return self._enabled

    @property
    def detached(self) -> bool:
        """Whether the edit was detached, as in a copy of the model."""
        return self._detached

    @property
    def modules(self) -> list[str]:
        """Dotted paths of the modules whose outputs are edited."""
        return self.edit.modules

    def set_strength(self, strength: float | str) -> None:
        """Change the strength from the next call of the model on; 0 switches the edit off bit for bit.

        Args:
            strength: Any finite number, or its text.

        Raises:
            SettingError: The strength is not a finite number, or the method has no strength.
        """
        value = check_strength(strength)
        if self._strength is None:
            raise SettingError(f"strength is {value}, but {self.edit.method} has no strength; leave it out")
        self._strength = value
        for tensor in self._strengths.values():
            tensor.fill_(value)
        self._update()

    def strength_tensor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a tensor of no dimensions that follows the strength, for compiled graphs.

        Args:
            device: Device of the tokens.
            dtype: Data type of the tokens; the tensor is float64 if it is float64, otherwise float32.
        """
        key = device, dtype == torch.float64
        if key not in self._strengths:
            with torch.inference_mode(False):
                wide = torch.float64 if key[1] else torch.float32
                self._strengths[key] = torch.tensor(self._strength, device=device, dtype=wide)
        return self._strengths[key]

    def add_hook(
        self, module: nn.Module, hook: Callable[..., Any], *, before: bool = False, with_kwargs: bool = False
    ) -> None:
        """Register a hook on a module until the edit is detached, and not on copies of the module.

        Args:
            module, hook, before, with_kwargs: As for ``sealign.models.hooks.add_hook``.
        """
        self.stack.callback(add_hook(module, Uncopied(self, hook), before=before, with_kwargs=with_kwargs))

    def switch(self, enabled: bool) -> None:
        """Switch the edit on or off; after ``detach`` this does nothing.

        Args:
            enabled: Whether the edit is on.
        """
        if self._detached:
            return
        self._enabled = enabled
        self._update()
        if self.on_switch is not None:
            self.on_switch(enabled)

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Switch the edit on or off inside a ``with`` block.

        Args:
            enabled: Whether the edit is on.
        """
        before = self._enabled
        self.switch(enabled)
        try:
            yield
        finally:
            self.switch(before)

    def detach(self) -> None:
        """Remove the edit; the model then computes bit for bit what it computed before. A second call does nothing."""
        # A graph that was compiled while the edit was attached keeps its hooks, but reads this.
        self._enabled = False
        self._detached = True
        self._update()
        self.stack.close()

    def _update(self) -> None:
        # A plain attribute, so that a compiled graph is guarded on it and not on the value of the strength.
        self.active: bool = self._enabled and self._strength != 0

    def __reduce__(self) -> Any:
        if not self._detached:
            warnings.warn(
                f"a {self.edit.method} edit is attached to the model, and its copy or pickle computes without it; "
                "attach the edit to the copy",
                stacklevel=2,
            )
        return _detached_handle, (self.edit,)


class Uncopied:
    """A function of an attached edit whose copies and pickles, which those of the model hold, do nothing.

    Args:
        handle: Handle of the edit.
        function: The function.
    """

    def __init__(self, handle: EditHandle, function: Callable[..., Any]) -> None:
        self._handle = handle
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)

    def __reduce__(self) -> Any:
        return Uncopied, (self._handle, _nothing)


def _nothing(*_: Any) -> None:
    """Stand in for a function that is not copied."""


def _detached_handle(edit: Intervention) -> EditHandle:
    handle = EditHandle(edit)
    handle.detach()
    return handle
