"""Extra loss terms that work with any method: one module each, imported on first use.

loss = petl.losses.read(cfg.loss)       # checks the config before a model is loaded; None without
model = petl.wrap(base, "mola")
petl.losses.attach(model, loss)         # before the first call of `petl.lifecycle(model)`
petl.lifecycle(model).report(batches)   # metrics on validation batches, before and after training
"""

from petl.core.losses import Loss, LossConfig, build_loss, list_losses, loss, read
from petl.core.registry import attach

__all__ = ["Loss", "LossConfig", "attach", "build_loss", "list_losses", "loss", "read"]
