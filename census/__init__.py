"""The census: the same measurements over many models, as tasks on Ray (`python -m census`)."""
