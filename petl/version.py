"""The version of petl."""

__version__ = "0.2.0"
