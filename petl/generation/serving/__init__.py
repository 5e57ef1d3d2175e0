"""An HTTP server for adapters of one base model, with one batch for all requests."""
