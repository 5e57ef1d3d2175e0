"""The output of the frozen blocks below the first trained one, computed once and kept on disk."""
