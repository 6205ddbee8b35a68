"""Every refusal and failure isolator can answer with, each with a stable code.

    IsolatorError
    ├── BadRequest          400  the request is malformed or asks for something that can't be
    ├── Forbidden           403  well-formed, but policy says no
    ├── NotFound            404  absent, or not the caller's to see (the two are told alike on purpose)
    ├── Conflict            409  true of something else already
    ├── PreconditionFailed  412  not any more what the caller believes it to be
    ├── TooLarge            413  over a bound of size
    ├── RangeRefused        416  a part of a file that is not there
    ├── UpgradeRequired     426  a WebSocket's address, asked for as a page
    ├── TooMany             429  over a bound of number or rate
    ├── BoxFailed           502  the engine built something other than what was asked, or could not start it
    ├── Unavailable         503  a part isolator depends on does not answer now; a retry may work
    └── Internal            500  a defect in isolator

`code` is what programs match on and is never renamed; `detail` is for people and says what to do.
`docs/errors.md` lists the codes; a test holds the two together.
"""

from __future__ import annotations

from typing import Any


class IsolatorError(Exception):
    """A refusal or failure with a stable code.

    Attributes:
        code: snake_case, stable, listed in docs/errors.md.
        detail: one or two sentences for a person: what is wrong and what to do.
        fields: further members of the problem+json answer, JSON values only, never a secret.
    """

    status = 500
    title = "Internal error"

    def __init__(self, code: str, detail: str, **fields: Any) -> None:
        """Keep code, detail and the case's own fields."""
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.fields: dict[str, Any] = fields

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 body."""
        return {
            "type": f"urn:isolator:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.fields,
        }


class BadRequest(IsolatorError):
    """The request is malformed or asks for something that can't be."""

    status = 400
    title = "Bad request"


class Forbidden(IsolatorError):
    """Well-formed, but policy says no."""

    status = 403
    title = "Refused by policy"


class NotFound(IsolatorError):
    """Absent, or not the caller's to see."""

    status = 404
    title = "Not found"


class Conflict(IsolatorError):
    """Something else already is what this asks to become."""

    status = 409
    title = "Conflict"


class PreconditionFailed(IsolatorError):
    """Not any more what the caller believes it to be."""

    status = 412
    title = "Changed meanwhile"


class TooLarge(IsolatorError):
    """Over a bound of size."""

    status = 413
    title = "Too large"


class RangeRefused(IsolatorError):
    """A part of a file that is not there."""

    status = 416
    title = "Range not satisfiable"


class UpgradeRequired(IsolatorError):
    """A WebSocket's address, asked for as a page."""

    status = 426
    title = "Upgrade required"


class TooMany(IsolatorError):
    """Over a bound of number or rate."""

    status = 429
    title = "Too many"


class BoxFailed(IsolatorError):
    """The engine built something other than what was asked, or could not start it."""

    status = 502
    title = "The box could not be built"


class Unavailable(IsolatorError):
    """A part isolator depends on does not answer now."""

    status = 503
    title = "Unavailable"


class Internal(IsolatorError):
    """A defect in isolator; the detail names where to look, never internals."""
