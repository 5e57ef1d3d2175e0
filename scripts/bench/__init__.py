"""What training, files and serving cost with each method, as ratios to what they must cost.

`scripts/bench.py` is the command; `shared/design/performance.md` derives the floor and the goals.
Everything goes through what a user calls (`petl.wrap`, PeftModel, `save_pretrained`), on models
with random weights, so that nothing is downloaded and the figures are those of the product.

Floor: the frozen model, forward and backward to the embeddings, with the same loss: 4 N T products,
N weights that multiply activations, T tokens. Counters (`counters`) repeat exactly, so tests assert
them; clocks (`clocks`) inform.
"""
