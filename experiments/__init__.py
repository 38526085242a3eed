"""Tasks, evidence and other mixers: what the layer is compared by. Not part of the package.

The import registers the other mixers: a model that was saved with one loads after it.
"""

from . import peers as peers
