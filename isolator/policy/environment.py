"""Which environment variables a request may set.

Refused are those that steer the dynamic loader: they would act on the guest, which is PID 1 of the box and keeps
watch there, before the agent's own command starts. Everything else is the agent's own affair.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from isolator.model.errors import BadRequest, Forbidden, TooLarge

MAX_BYTES = 262_144
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z", re.ASCII)
_REFUSED_PREFIXES = ("LD_", "ISOLATOR_", "GLIBC_")
_REFUSED = frozenset({"GCONV_PATH", "GETCONF_DIR", "HOSTALIASES", "LOCALDOMAIN", "NIS_PATH", "NLSPATH", "RES_OPTIONS"})


def check_variable_name(name: str) -> str:
    """The name, unchanged.

    Raises:
        BadRequest: `env_name_invalid`.
        Forbidden: `env_name_refused`.
    """
    if not _NAME.match(name):
        raise BadRequest(
            "env_name_invalid",
            "Environment names must be 1 to 128 of A-Z, a-z, 0-9 and _, not starting with a digit.",
            name=name[:64].encode("ascii", "backslashreplace").decode(),
        )
    if name.startswith(_REFUSED_PREFIXES) or name in _REFUSED:
        raise Forbidden(
            "env_name_refused",
            f"{name} steers the loader or isolator itself and can't be set. Set it inside the command if you must.",
            name=name,
        )
    return name


def check_environment(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The variables in the order of their names.

    Raises:
        BadRequest: `env_name_invalid`, `env_value_invalid` (NUL or lone surrogates inside).
        Forbidden: `env_name_refused`.
        TooLarge: `env_too_large`.
    """
    total = 0
    for name, value in environment.items():
        check_variable_name(name)
        check_text(value, "env_value_invalid", f"The value of {name}")
        total += len(name) + len(value.encode()) + 2
    if total > MAX_BYTES:
        raise TooLarge("env_too_large", f"The environment has {total} bytes; {MAX_BYTES} are allowed.", limit=MAX_BYTES)
    return tuple(sorted(environment.items()))


def check_text(value: str, code: str, what: str) -> str:
    """The text, unchanged, if it can be an argument of a process.

    Raises:
        BadRequest: with the code given; NUL inside, or not encodable as UTF-8.
    """
    if "\x00" in value:
        raise BadRequest(code, f"{what} holds a NUL character, which no process can be given.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequest(code, f"{what} holds half a surrogate pair, which is no text.") from None
    return value
