"""The load and store engines."""
