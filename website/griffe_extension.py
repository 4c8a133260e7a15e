"""Extension of griffe, which reads the source for the pages of the interface."""

from __future__ import annotations

from typing import Any

import griffe

from website.docstrings import as_griffe_reads, with_default


class Docstrings(griffe.Extension):
    """Shows examples as code, a description for each argument, and the default of each setting."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a loaded object.

        Args:
            obj: Module, class, function or attribute that griffe has loaded.
        """
        if obj.docstring:
            obj.docstring.value = as_griffe_reads(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the defaults to the settings that the docstring of a configuration lists, which has no signature.

        Args:
            cls: Class that griffe has loaded.
        """
        if cls.path == "sealign.configuration.Config":  # takes the fields of its subclasses, which it does not name
            cls.del_member("__init__")
        if cls.docstring and "dataclass" not in cls.labels:
            for name, attribute in cls.attributes.items():
                if attribute.value and str(attribute.value) != "None":
                    cls.docstring.value = with_default(cls.docstring.value, name, str(attribute.value))
