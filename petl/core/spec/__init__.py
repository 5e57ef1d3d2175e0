"""Declarations of a method: config fields, registry entry, capabilities; and of extra losses."""
