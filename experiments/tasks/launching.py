"""A lock for threads that train on the same GPU."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

_LOCK = threading.RLock()


def launch_lock() -> AbstractContextManager[object]:
    """Inside, no other thread of the process makes a step (`experiments.tasks.replay`)."""
    return _LOCK
