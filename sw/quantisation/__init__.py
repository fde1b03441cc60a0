"""Quantising float models: what ``python -m sw.quantize`` is made of, one step a module."""
