"""LoRA layers in one fused kernel."""
