"""The handle of an edit that is attached to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from sealign.edits.strength import check_strength
from sealign.errors import SettingError

if TYPE_CHECKING:
    from sealign.edits.intervention import Intervention


class EditHandle:
    """An edit, or another intervention, that is attached to a model.

    Hooks read ``active`` and ``strength`` each time the model runs.

    Args:
        edit: Edit or other intervention.

    Attributes:
        edit: The edit.
        stack: Callbacks that detach it.
        on_switch: Function of the new value of ``enabled`` that is called after each switch, for interventions that
            do not act through hooks.
    """

    def __init__(self, edit: Intervention) -> None:
        self.edit = edit
        self.stack = ExitStack()
        self.on_switch: Callable[[bool], None] | None = None
        self._enabled = True
        self._detached = False
        self._strength = edit.strength

    @property
    def strength(self) -> float | None:
        """Current strength; None if the method has none."""
        return self._strength

    @property
    def enabled(self) -> bool:
        """Whether the edit is switched on."""
        return self._enabled

    @property
    def active(self) -> bool:
        """Whether the edit changes anything: it is switched on and its strength is not 0."""
        return self._enabled and self._strength != 0

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

    def switch(self, enabled: bool) -> None:
        """Switch the edit on or off; after ``detach`` this does nothing.

        Args:
            enabled: Whether the edit is on.
        """
        if self._detached:
            return
        self._enabled = enabled
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
        self.stack.close()
