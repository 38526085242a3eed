"""Tasks, evidence and other mixers: what the layer is compared by. Not part of the package."""
