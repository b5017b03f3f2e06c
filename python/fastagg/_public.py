"""Public names: a class belongs to the module that users import it from, wherever its file is."""

from __future__ import annotations

from typing import Any


def name_publicly(namespace: dict[str, Any]) -> None:
    """Lets the classes of a module's `__all__` name that module in pickles, error messages and `help`.

    So files can move without breaking what users have pickled.
    """
    for name in namespace["__all__"]:
        value = namespace.get(name)
        if isinstance(value, type) and value.__module__.startswith("fastagg."):
            value.__module__ = namespace["__name__"]
