"""Errors that the user can correct."""

from __future__ import annotations


class UserError(Exception):
    """An error in the user's input. The message is one line: what is wrong, and how to correct it.

    The command line prints it as `gka COMMAND: error: ...`, without a traceback, and ends with exit code 2.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: OSError) -> str:
    """Describe an operating system error in a few words, e.g. "no such file or directory"."""
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
