"""The values of a spawn's secrets, in the form the guest is told: from the request, or from the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isolator.host.secrets import read_secret
from isolator.model.box import SecretRef
from isolator.model.errors import BadRequest, TooLarge
from isolator.model.identity import Principal
from isolator.model.request import SecretRequest
from isolator.policy.compile import SECRETS_SIZE

_PAGE = 4096


def collect_secrets(
    asked: Sequence[SecretRequest],
    refs: Sequence[SecretRef],
    caller: Principal,
    secret_dir: Path,
    credentials: Path | None,
) -> list[tuple[str, str, bytes]]:
    """(letter, name, value) of each: `s` a file, `E` a variable. Reads files: call it on a thread.

    Raises:
        NotFound, Forbidden, TooLarge: as `read_secret`. BadRequest: `secret_value_invalid`.
        TooLarge: `secrets_too_large`: they do not fit into the box's memory for secret files together.
    """
    values: list[tuple[str, str, bytes]] = []
    for wish, ref in zip(asked, refs, strict=True):
        if ref.delivery == "file":
            value = (
                read_secret(ref.name, caller, secret_dir, credentials) if wish.value is None else wish.value.encode()
            )
            values.append(("s", ref.name, value))
            continue
        if wish.value is not None:
            value = wish.value.encode()
        else:
            # A file of one line is what people write; a variable with a newline at its end is what nobody means.
            value = read_secret(ref.name, caller, secret_dir, credentials).rstrip(b"\n")
        if b"\x00" in value:
            raise BadRequest("secret_value_invalid", f"The secret {ref.name} holds a NUL: hand it over as a file.")
        values.append(("E", ref.variable or ref.name, value))
    # A tmpfs gives whole pages.
    if sum(-len(value) // _PAGE * -_PAGE for letter, _, value in values if letter == "s") > SECRETS_SIZE:
        raise TooLarge(
            "secrets_too_large",
            f"The secret files have more than {SECRETS_SIZE} bytes together, each rounded up to {_PAGE}.",
        )
    return values
