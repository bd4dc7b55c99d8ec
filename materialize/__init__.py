"""Move features from Delta Lake to the online store, exactly and fast."""

__all__ = ["__version__"]

__version__ = "0.1.0"
