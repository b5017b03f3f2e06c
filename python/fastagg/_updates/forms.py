"""Replies in groups of one form each: most clients decide which form is right, and not who comes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

MOST_FORMS = 4  # each has sums as large as a model: hostile clients can send a form of their own each

Form = TypeVar("Form", bound=Hashable)
Group = TypeVar("Group")


class Forms(Generic[Form, Group]):
    """At most `MOST_FORMS` groups by form; of equal rank, the one that came first is the best.

    What has come twice stays before what has come once: so clients with a form each cannot push out what many agree on.
    """

    def __init__(self, rank: Callable[[Form, Group], Any]) -> None:
        """No groups; `rank` is larger for the better ones, and grows with a group."""
        self._rank = rank
        self._groups: dict[Form, Group] = {}
        self._grown: dict[Form, int] = {}  # when each has last grown
        self._seen: Counter[int] = Counter()  # how often each has grown, also those that had to go
        self._time = 0

    def __iter__(self) -> Iterator[tuple[Form, Group]]:
        return iter(self._groups.items())

    def get(self, form: Form) -> Group | None:
        """The group of a form."""
        return self._groups.get(form)

    def has_grown(self, form: Form, group: Group) -> Group | None:
        """Keeps a group that has grown or is new; returns one that had to go: the least seen, lowest, oldest."""
        self._time += 1
        self._seen[hash(form)] += 1
        self._groups[form], self._grown[form] = group, self._time
        if len(self._groups) <= MOST_FORMS:
            return None
        others = [other for other in self._groups if other != form]
        lowest = min(others, key=self._worth)
        del self._grown[lowest]
        return self._groups.pop(lowest)

    def _worth(self, form: Form) -> tuple[int, Any, int]:
        return self._seen[hash(form)], self._rank(form, self._groups[form]), self._grown[form]

    def best(self) -> Form | None:
        """The form of the highest rank; None if there is none."""
        return max(self._groups, key=lambda form: self._rank(form, self._groups[form]), default=None)
