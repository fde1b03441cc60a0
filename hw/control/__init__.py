"""Command fetch, engine shells with queues and tokens, registers, trace."""
