"""The Python client of the daemon: `Client`, what it answers, and what it raises."""

from isolator.client.answers import (
    Agent,
    AuditEntry,
    AuditState,
    Event,
    Exit,
    Guarantee,
    Image,
    Info,
    NetworkMode,
    Team,
)
from isolator.client.client import Client
from isolator.client.errors import (
    AnswerInvalid,
    AnswerTimeout,
    ConnectionLost,
    IsolatorClientError,
    ProblemError,
    SocketDenied,
    SocketNotFound,
    SocketUntrusted,
)
from isolator.client.following import EventStream, LogStream
from isolator.client.streams import STDERR, STDOUT

__all__ = [
    "STDERR",
    "STDOUT",
    "Agent",
    "AnswerInvalid",
    "AnswerTimeout",
    "AuditEntry",
    "AuditState",
    "Client",
    "ConnectionLost",
    "Event",
    "EventStream",
    "Exit",
    "Guarantee",
    "Image",
    "Info",
    "IsolatorClientError",
    "LogStream",
    "NetworkMode",
    "ProblemError",
    "SocketDenied",
    "SocketNotFound",
    "SocketUntrusted",
    "Team",
]
