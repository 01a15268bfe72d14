"""Maintainers' tools: run and export the notebooks, the benchmark."""
