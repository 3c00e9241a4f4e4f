"""The fast step: hand-written layers and kernels, CUDA graphs, and decoding.

In goes a loaded model that `bind` accepts (`Unsupported` says why not), out come losses, gradients, log-likelihoods and answers,
the same as the model's own up to rounding. `layout` and `streams` do without torch.
"""
