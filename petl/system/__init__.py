"""The machine: files, settings, packages, processes, progress; knows no adapter and no model."""
