"""Where a notebook runs: Colab or a checkout, and what a restarted kernel says."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
