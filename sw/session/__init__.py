"""Whole models: accelerator and host segments in turn."""
