"""The post-processing engine: requantise, combine, look up, write back."""
