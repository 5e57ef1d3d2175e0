"""Tells what goes wrong in silence while a model trains, in any loop: `petl.watch`."""
