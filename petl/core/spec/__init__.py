"""Declarations of a method: config fields, registry entry; and of extra losses."""
