"""From a saved adapter to another folder: export, compress, combine, search, shrink."""
