"""Errors that the person at the keyboard can put right."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what was asked for: one line that says what is wrong and what to do.

    The command line prints it as `gka COMMAND: error: ...` and ends with exit code 2; no traceback.
    """


def reason(error: OSError) -> str:
    """Say an operating system error in a few words, e.g. "no such file or directory"."""
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
