"""Where a notebook runs: Colab or a checkout, and what a restarted kernel says."""
