"""Handwritten digits, federated by Flower and averaged by fastagg."""
