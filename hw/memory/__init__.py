"""The banked scratchpad."""
