"""`petl check`: what is wrong with a saved adapter, wherever it was trained.

Files are read as data: no pickle, no code, no model unless a base is given. torch, PEFT and
transformers are not imported without one, so that an answer takes less than a second.
"""
