"""The op in PyTorch: the chunk-wise form on any device, and one decode step."""
