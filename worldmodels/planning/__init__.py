"""Batched tree search over callables: nothing here knows a model, an environment or a replay."""
