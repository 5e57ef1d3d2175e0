"""`petl check`: what is wrong with a saved adapter, wherever it was trained.

Files are read as data: no pickle, no code, no weights of a model unless a base is given. torch,
PEFT and transformers take seconds to import. Without a base they are imported in two cases only:
names or sizes look unlike those of a base on this machine; the method is unknown, and a package
that is installed offers methods.
"""
