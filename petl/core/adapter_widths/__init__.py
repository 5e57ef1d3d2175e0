"""Widths of an adapter: its first k components alone, in memory and in files."""
