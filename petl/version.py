"""The version of petl."""

__version__ = "0.1.0"
