"""Keep the libraries' notices out of a terminal where a person follows one progress bar."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Show errors only, of every library, and where the op is slow; for commands, not called by the library."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", message="gated_kalmanet")  # a slow path is worth a line
