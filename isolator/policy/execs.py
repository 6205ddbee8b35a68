"""The one decision of an exec: request + the agent's spec + settings -> a plan, or a typed refusal. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from isolator.model.box import BoxSpec
from isolator.model.errors import BadRequest
from isolator.model.request import CommandRequest, ExecRequest, RunRequest
from isolator.policy.compile import check_command
from isolator.policy.environment import check_environment, check_text
from isolator.settings import Settings

MAX_TIMEOUT = 7 * 86_400.0
_TERMINAL = "xterm"


@dataclass(frozen=True, slots=True)
class ExecPlan:
    """What will be done: argv, variables beside the agent's own, folder, seconds, bytes kept of each stream."""

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    working_dir: str
    timeout: float | None
    max_output: int | None
    tty: bool = False
    size: tuple[int, int] | None = None


def plan_exec(request: CommandRequest, spec: BoxSpec, settings: Settings) -> ExecPlan:
    """The plan that answers this request.

    Raises:
        BadRequest: `command_invalid`, `command_too_long`, `env_name_invalid`, `env_value_invalid`, `cwd_invalid`,
            `limit_out_of_range`. Forbidden: `env_name_refused`. TooLarge: `env_too_large`.
    """
    if request.timeout is not None and not 0 < request.timeout <= MAX_TIMEOUT:
        raise BadRequest(
            "limit_out_of_range",
            f"timeout must be more than 0 and at most {MAX_TIMEOUT:.0f} seconds.",
            field="timeout",
            maximum=MAX_TIMEOUT,
        )
    environment = check_environment(request.env)
    tty = isinstance(request, ExecRequest) and request.tty
    if tty and "TERM" not in request.env:
        environment = (*environment, ("TERM", _TERMINAL))
    size = request.size if isinstance(request, ExecRequest) else None
    return ExecPlan(
        command=check_command(request.command),
        environment=environment,
        working_dir=spec.working_dir if request.cwd is None else _folder(request.cwd),
        timeout=request.timeout,
        max_output=_output(request, settings),
        tty=tty,
        size=None if size is None else (size.width, size.height),
    )


def _folder(text: str) -> str:
    check_text(text, "cwd_invalid", "The working folder")
    if not text.startswith("/"):
        raise BadRequest("cwd_invalid", "The working folder must be an absolute path of the box.", field="cwd")
    return text


def _output(request: CommandRequest, settings: Settings) -> int | None:
    most = settings.run_max_output if isinstance(request, RunRequest) else None
    if request.max_output is None:
        return most
    if request.max_output < 0 or (most is not None and request.max_output > most):
        raise BadRequest(
            "limit_out_of_range",
            f"max_output must be 0 to {most} bytes. Use exec, or a file, for more."
            if most is not None
            else "max_output must not be negative.",
            field="max_output",
        )
    return request.max_output
