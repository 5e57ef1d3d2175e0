"""Learning from preferences: pairs (DPO, ORPO, reward models), rated answers (KTO), rewards (GRPO).

The losses are those of TRL's trainers, up to rounding; tests compare them on the same rows. The
reference model is the base: the model with its adapter disabled, which needs no second copy.
"""
