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
    PoolBox,
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
from isolator.client.execs import Exec, ExecStatus, RunResult
from isolator.client.files import AgentFiles, FileInfo, FileList, FileStream
from isolator.client.following import EventStream, LogStream
from isolator.client.messages import Message, MessageStream
from isolator.client.stats import AgentStats, AllStats, Progress, Use
from isolator.client.streams import STDERR, STDOUT

__all__ = [
    "STDERR",
    "STDOUT",
    "Agent",
    "AgentFiles",
    "AgentStats",
    "AllStats",
    "AnswerInvalid",
    "AnswerTimeout",
    "AuditEntry",
    "AuditState",
    "Client",
    "ConnectionLost",
    "Event",
    "EventStream",
    "Exec",
    "ExecStatus",
    "Exit",
    "FileInfo",
    "FileList",
    "FileStream",
    "Guarantee",
    "Image",
    "Info",
    "IsolatorClientError",
    "LogStream",
    "Message",
    "MessageStream",
    "NetworkMode",
    "PoolBox",
    "ProblemError",
    "Progress",
    "RunResult",
    "SocketDenied",
    "SocketNotFound",
    "SocketUntrusted",
    "Team",
    "Use",
]
