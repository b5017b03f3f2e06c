"""What clients' NaNs and integers are to become."""

from __future__ import annotations

NAN_POLICIES = ("raise", "drop", "propagate")


INTEGER_POLICIES = ("max", "first", "round")


def check_policies(nan_policy: str, integer_policy: str | None) -> None:
    """Raises ValueError for a policy that does not exist."""
    if nan_policy not in NAN_POLICIES:
        raise ValueError(f"nan_policy: expected one of {', '.join(NAN_POLICIES)}, got {nan_policy!r}")
    if integer_policy is not None and integer_policy not in INTEGER_POLICIES:
        raise ValueError(f"integer_policy: expected one of {', '.join(INTEGER_POLICIES)}, got {integer_policy!r}")
