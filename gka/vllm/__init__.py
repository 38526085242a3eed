"""vLLM: models of this library, and published checkpoints, in vLLM's engine.

vLLM loads `plugin.register` by the entry point `vllm.general_plugins`, in each of its processes. Only then is vLLM
imported; nothing else of the library imports this package.
"""
