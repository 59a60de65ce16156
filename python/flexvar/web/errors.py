"""Whatever a user can cause is a message in the page, without a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from flexvar._errors import is_out_of_memory

#: Of the server, and nobody's business: of a file its name is said.
_FOLDERS = re.compile(r"(?<!\S)/(?:[^/\s]+/)+")


@contextmanager
def shown_errors() -> Iterator[None]:
    """Turns errors of arguments, files and memory into the page's own message."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, OSError, MemoryError) as error:
        raise _message(error) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _message(error) from None


def _message(error: Exception) -> gr.Error:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    text = _FOLDERS.sub("", " ".join(text.split()))
    return gr.Error(text or type(error).__name__, print_exception=False)
