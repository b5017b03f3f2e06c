"""Clients' updates, checked: structure, leaves, weights, policies, results."""
