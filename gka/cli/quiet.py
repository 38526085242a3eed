"""Hide notices of other libraries, so that the terminal shows the progress bar only."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Hide all notices except errors and warnings of slow paths. Only commands call this, not the library."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", message="gated_kalmanet")  # warnings of slow paths stay visible
