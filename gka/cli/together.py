"""Work that ends alike in all processes that torchrun starts: if it fails in one, all stop with that error.

Otherwise the other processes fail a moment later because of it, for example with a file that was never written.
torchrun can then name that as the cause.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from ..training.errors import UserError, first_line, reason

Result = TypeVar("Result")


def together(work: Callable[[], Result]) -> Result:
    """Call `work` in every process and wait for all of them; the result in this process.

    Every process calls it, after `training_arguments`, which joins the processes.

    Args:
        work: a function without collectives.

    Raises:
        UserError: `work` failed in a process, the first of these if there are several; all processes have the same
            message.
        Exception: `work` failed first in this process, with an error that is not the user's.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    told = gather_object([None if error is None else _line(error)])
    failed = [(process, line) for process, line in enumerate(told) if line is not None]
    if not failed:
        return result
    process, line = failed[0]
    if error is not None and process == PartialState().process_index and not _is_the_users(error):
        raise error
    raise UserError(f"process {process}: {line}" if process else line) from error


def _is_the_users(error: Exception) -> bool:
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {reason(error)}"
    text = first_line(error)
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
