"""Weighted means: of all updates at once, and of updates as they come."""
