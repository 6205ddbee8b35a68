"""How an agent ended, told from what the guest, the engine and we ourselves know. Pure."""

from __future__ import annotations

from isolator.agents.live import Report
from isolator.backends.base import Box
from isolator.model.agent import Exit, Reason

_SIGNAL_BASE = 128
_SIGKILL = 9
_MOST_SIGNALS = 64


def decide_exit(report: Report | None, box: Box | None, cause: Reason | None, detail: str | None) -> Exit:
    """The agent's ending.

    Args:
        report: what the guest said; None if the box ended without a word.
        box: what the engine says of the ended box; None if it has none any more.
        cause: why isolator ended it, None if it did not.
        detail: a sentence that belongs to the cause.
    """
    if report is not None:
        signal = report.signal or None
        code = _SIGNAL_BASE + report.signal if report.signal else report.code
        oom_kills = report.oom_kills
    elif box is not None and box.exit_code is not None:
        code = box.exit_code
        signal = code - _SIGNAL_BASE if _SIGNAL_BASE < code <= _SIGNAL_BASE + _MOST_SIGNALS else None
        oom_kills = int(box.oom_killed)
    else:
        return Exit(None, None, cause or "lost", detail or "The box vanished from the engine.")
    killed_hard = signal == _SIGKILL or code == _SIGNAL_BASE + _SIGKILL
    if oom_kills and killed_hard and cause is None:
        return Exit(code, signal or _SIGKILL, "oom", "It used more memory than its limit.")
    if cause is not None:
        return Exit(code, signal, cause, detail)
    if signal is not None:
        return Exit(code, signal, "killed", detail)
    told = f"The kernel killed {oom_kills} of its processes for memory." if oom_kills else None
    return Exit(code, None, "exited", told)
