"""What all commands share: how they end, with an exit code and no traceback for a user's error, and types of arguments."""

import argparse
import os
import sys
from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError


TOLD = (OSError, ValueError, StrictDataclassError)  # what the code of this repository raises for its users


def exit_code(
    name: str,
    job: Callable[[], object],
    told: tuple[type[Exception], ...] = TOLD,
    one_line: bool = True,
) -> int:
    """
    Runs a job; 0, or 2 after one of the errors `told`, which is told without a traceback, 130 after Ctrl-C, and 141 when
    the reader of the output has gone, such as `head`.
    """
    try:
        job()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail to flush it at exit
        return 141
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except told as error:
        print(f"{name}: error: {' '.join(str(error).split()) if one_line else error}", file=sys.stderr)
        return 2
    return 0


def positive(value: str) -> int:
    """A whole number above 0, for argparse."""
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {value!r}")
    return int(value)
