"""Requantisation of int32 sums to int8."""
