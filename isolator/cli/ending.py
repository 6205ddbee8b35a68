"""To end by a signal, so that whoever waits for us sees the very end they would see of the command."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from typing import NoReturn

_BASE = 128


def end_by(number: int) -> NoReturn:
    """End by this signal, without a core file; by exit code 128 + number where it does not end us."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    # To the kernel a limit of 1 also means no core to a program that collects them; 0 does not.
    resource.setrlimit(resource.RLIMIT_CORE, (0 if most == 0 else 1, most))
    with contextlib.suppress(OSError, ValueError):  # KILL's can't be set, and need not be
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        signal.raise_signal(number)
    # Reached by the first process of a container, which signals without a handler do not end.
    sys.exit(_BASE + number)
