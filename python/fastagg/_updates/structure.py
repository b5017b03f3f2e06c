"""The structure of an update: one array, a sequence of arrays or a mapping from names to arrays."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastagg._arrays.registry import kind_of
from fastagg._quoting import quoted, quoted_list
from fastagg.quantization.quantized import Quantized


def is_leaf(update: Any) -> bool:
    """Whether an update is a single array."""
    if isinstance(update, Quantized) or kind_of(update) is not None:
        return True
    return hasattr(update, "__dlpack__") or hasattr(update, "__cuda_array_interface__")


def _who(client: int | str) -> str:
    """A client, or what else has leaves, as error messages call it."""
    return f"client {client}" if isinstance(client, int) else client


class Structure:
    """The names of an update's leaves, and how to take updates apart and put results together."""

    def __init__(self, update: Any, client: int | str = 0) -> None:
        """The structure of a client's update; errors name the client, or whatever it is that has a name.

        Raises:
            TypeError: it is neither an array nor a flat sequence or mapping.
            ValueError: it has no leaves.
        """
        self.names: tuple[Any, ...]
        self.container: type | None
        if is_leaf(update):
            self.container, self.names = None, ()
        elif isinstance(update, Mapping):
            self.container, self.names = type(update), tuple(update)
        elif isinstance(update, Sequence) and not isinstance(update, (str, bytes, bytearray)):
            self.container, self.names = type(update), tuple(range(len(update)))
        else:
            hint = ": pass its state_dict()" if hasattr(update, "state_dict") else ""
            raise TypeError(
                f"{_who(client)}: expected an array, a sequence of arrays or a mapping of arrays, "
                f"got {type(update).__name__}{hint}"
            )
        self.is_mapping = isinstance(update, Mapping)
        if self.container is not None and not self.names:
            raise ValueError(f"{_who(client)}: the update has no leaves")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def places_in(self, other: Structure) -> list[int] | None:
        """Where the other has each leaf of this one, mappings by name; None unless both have the same leaves."""
        if (self.container is None) != (other.container is None):
            return None
        if self.container is None or self.names == other.names:
            return list(range(len(self.names) or 1))
        if not (self.is_mapping and other.is_mapping) or set(self.names) != set(other.names):
            return None
        places = {name: place for place, name in enumerate(other.names)}
        return [places[name] for name in self.names]

    def describe(self) -> dict[str, Any]:
        """Plain values, for a checkpoint. Types other than Python's own containers come back as dict or list."""
        container = None if self.container is None else self.container.__name__
        return {"container": container, "mapping": self.is_mapping, "names": list(self.names)}

    @classmethod
    def described(cls, plain: dict[str, Any]) -> Structure:
        """The structure that `describe` described.

        Raises:
            KeyError, TypeError, ValueError: no structure is described so.
        """
        structure = cls.__new__(cls)
        names, is_mapping, container = tuple(plain["names"]), plain["mapping"], plain["container"]
        if not isinstance(is_mapping, bool) or not isinstance(container, (str, type(None))):
            raise TypeError(f"a container is described by its name and a bool, got {container!r} and {is_mapping!r}")
        fitting = not names and not is_mapping if container is None else bool(names)
        if not fitting or len(set(names)) < len(names) or not (is_mapping or names == tuple(range(len(names)))):
            raise ValueError(f"leaves of a {container} cannot have these {len(names)} names")
        known = {None: None, "dict": dict, "OrderedDict": OrderedDict, "list": list, "tuple": tuple}
        structure.names, structure.is_mapping = names, is_mapping
        structure.container = known.get(container, dict if is_mapping else list)
        if container is not None and is_mapping != issubclass(structure.container or dict, Mapping):
            raise ValueError(f"a {container} is {'no' if is_mapping else 'a'} mapping")
        return structure

    def leaf_name(self, index: int) -> str:
        """A leaf as error messages call it."""
        return "the array" if self.container is None else f"leaf {quoted(self.names[index])}"

    def columns(self, updates: list[Any]) -> list[list[Any]]:
        """For each leaf, what all clients sent. Updates of the first one's type are looked at without a call each."""
        if self.container is None:
            if len(set(map(type, updates))) > 1:
                for client, update in enumerate(updates):
                    self.leaves(update, client)
            return [updates]
        if self.container is dict or self.container is OrderedDict:
            count = len(self.names)
            if all(type(update) is self.container and len(update) == count for update in updates):
                with suppress(KeyError):  # whose message `leaves` knows
                    return [[update[name] for update in updates] for name in self.names]
        rows = [self.leaves(update, client) for client, update in enumerate(updates)]
        return [list(column) for column in zip(*rows, strict=True)]

    def leaves(self, update: Any, client: int | str, like: str = "the first client's") -> list[Any]:
        """The leaves of an update of this structure, which errors call that of `like`, in this structure's order.

        Raises:
            TypeError, ValueError: the update is built otherwise; the message names the client and what differs.
        """
        who = _who(client)
        if self.container is None:
            if not is_leaf(update):
                raise TypeError(f"{who}: expected an array like {like}, got {type(update).__name__}")
            return [update]
        if self.is_mapping:
            if not isinstance(update, Mapping):
                raise TypeError(f"{who}: expected a mapping like {like}, got {type(update).__name__}")
            if len(update) != len(self.names) or not all(name in update for name in self.names):
                raise ValueError(f"{who}: {self._different_names(update)}")
            return [update[name] for name in self.names]
        if is_leaf(update) or not isinstance(update, Sequence):
            raise TypeError(f"{who}: expected a sequence like {like}, got {type(update).__name__}")
        if len(update) != len(self.names):
            raise ValueError(f"{who}: expected {len(self.names)} leaves, got {len(update)}")
        return list(update)

    def _different_names(self, update: Mapping[Any, Any]) -> str:
        own = set(self.names)
        missing = [name for name in self.names if name not in update]
        unexpected = [name for name in update if name not in own]
        parts = [
            f"{what} {quoted_list(names[:5])}{', …' if len(names) > 5 else ''}"
            for what, names in (("missing leaves", missing), ("unexpected leaves", unexpected))
            if names
        ]
        return " and ".join(parts)

    def build(self, leaves: list[Any], like: Any = None) -> Any:
        """A structure of new leaves; `like`, if given, lends its type's attributes (a state_dict's _metadata)."""
        if self.container is None:
            return leaves[0]
        if self.is_mapping:
            return self._build_mapping(dict(zip(self.names, leaves, strict=True)), like)
        if hasattr(self.container, "_fields"):  # a named tuple
            return self.container(*leaves)
        try:
            return self.container(leaves)
        except TypeError:
            return leaves

    def _build_mapping(self, named: dict[Any, Any], like: Any) -> Any:
        if self.container is dict:
            return named
        try:
            # A mapping of another kind could share its storage with its copy.
            result = copy.copy(like) if isinstance(like, dict) else self.container()  # type: ignore[misc]
            result.update(named)
        except (AttributeError, TypeError):  # a mapping that cannot be built or written
            return named
        return result


def as_list(updates: Iterable[Any]) -> list[Any]:
    """K updates as a list.

    Raises:
        TypeError, ValueError: they are a single mapping or array, no sequence, or none.
    """
    if isinstance(updates, Mapping):
        raise TypeError("updates: expected a sequence of updates, got a single mapping")
    if _is_array_of_numbers(updates):
        dimensions = "one dimension" if updates.ndim else "no dimension"  # type: ignore[attr-defined]
        raise TypeError(f"updates: expected a sequence of updates, got a single array of {dimensions}")
    if not hasattr(updates, "__iter__"):
        raise TypeError(f"updates: expected a sequence of updates, got {type(updates).__name__}")
    listed = list(updates)
    if not listed:
        raise ValueError("updates: expected at least one, got none")
    return listed


def _is_array_of_numbers(updates: Any) -> bool:
    """Whether it is an array of numbers; the rows of one with more dimensions, or of Python objects, may be updates."""
    return getattr(updates, "ndim", 2) < 2 and is_leaf(updates) and updates.dtype != object
