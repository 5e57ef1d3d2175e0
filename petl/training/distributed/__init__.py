"""Several processes: launchers, DDP, FSDP2, DeepSpeed, failures."""
