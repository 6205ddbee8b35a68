"""The connection to the Docker Engine: bounded threads, and its errors turned into ours in one place.

The SDK is synchronous, so each call runs on one of a few threads; the event loop never waits for the engine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import docker
import docker.errors
import requests.exceptions

from isolator.model.errors import BoxFailed, Conflict, IsolatorError, NotFound, Unavailable

Result = TypeVar("Result")
_MESSAGE_LENGTH = 600


def unavailable(error: BaseException) -> Unavailable:
    """The refusal while the engine does not answer."""
    return Unavailable(
        "engine_unavailable",
        "The Docker Engine does not answer. Start it (systemctl start docker) and try again; see isolator doctor.",
        reason=type(error).__name__,
        retry_after=2,
    )


def translate(error: Exception) -> IsolatorError:
    """One of our errors for one of the engine's."""
    if isinstance(error, IsolatorError):
        return error
    if isinstance(error, docker.errors.NotFound):
        return NotFound("engine_not_found", _explain(error))
    if isinstance(error, docker.errors.APIError):
        if error.status_code == 409:
            return Conflict("engine_conflict", _explain(error))
        return BoxFailed("engine_refused", f"The engine refused: {_explain(error)}")
    if isinstance(error, docker.errors.DockerException | requests.exceptions.RequestException | OSError):
        return unavailable(error)
    raise error


def _explain(error: docker.errors.APIError) -> str:
    return str(error.explanation or error)[:_MESSAGE_LENGTH]


class Engine:
    """Calls to one Docker Engine.

    `socket` is the engine's Unix socket, `timeout` the longest wait for one answer in seconds, `workers` the
    number of calls made at the same time.
    """

    def __init__(self, socket: Path, timeout: float, workers: int) -> None:
        """Nothing is connected yet: the engine may come later."""
        self.socket = socket
        self._timeout = timeout
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="isolator-engine")
        self._client: docker.APIClient | None = None
        self._lock = threading.Lock()

    def connect(self, timeout: float | None = None) -> docker.APIClient:
        """A new client with its own connections. Raises what the SDK raises."""
        return docker.APIClient(
            base_url=f"unix://{self.socket}",
            version="auto",
            timeout=timeout or self._timeout,
            max_pool_size=self._workers + 2,
        )

    def client(self) -> docker.APIClient:
        """The shared client, connected at first use."""
        with self._lock:
            if self._client is None:
                self._client = self.connect()
            return self._client

    async def call(self, function: Callable[[docker.APIClient], Result]) -> Result:
        """Run one call on a thread.

        Raises:
            NotFound: `engine_not_found`. Conflict: `engine_conflict`. BoxFailed: `engine_refused`.
            Unavailable: `engine_unavailable`.
        """

        def guarded() -> Result:
            try:
                return function(self.client())
            except Exception as error:
                raise translate(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._threads, guarded)

    async def ping(self) -> bool:
        """Whether the engine answers, within the timeout."""
        try:
            await self.call(lambda client: client.ping())
        except IsolatorError:
            return False
        return True

    async def version(self) -> dict[str, Any]:
        """The engine's version answer."""
        answer: dict[str, Any] = await self.call(lambda client: client.version())
        return answer

    def close(self) -> None:
        """Drop connections and threads; calls under way end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None
