"""ridgeline: rewrite a PyTorch model for one machine, and account for every step."""

__version__ = "0.1.0"
