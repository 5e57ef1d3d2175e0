"""Imports: petl registers with PEFT when that is imported; optional packages; import noise."""
