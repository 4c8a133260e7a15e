"""A queue for a model: jobs run in the order in which they came, and report events."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sealign.errors import SealignError, ServingError, first_sentence
from sealign.playground.pasted_rows import RowError

MAX_JOBS = 32
"""Largest number of jobs that run or wait."""

Event = dict[str, Any]
"""What is told to a page: a name under ``event``, and values that JSON can hold."""

_log = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818 - no error: the user has asked for it
    """A job was stopped by the user."""


class Job:
    """Work on the model, and the events that it reports.

    Args:
        work: Function of the job that reports with ``tell`` and calls ``check`` often.
    """

    def __init__(self, work: Callable[[Job], None]) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._stopped = threading.Event()

    def tell(self, event: str, **values: Any) -> None:
        """Report an event, from any thread.

        Args:
            event: Name of the event.
            values: Values that JSON can hold.
        """
        self._put({"event": event, **values})

    def stop(self) -> None:
        """Stop the job at its next ``check``, or before it starts."""
        self._stopped.set()

    def check(self) -> None:
        """Raise if the job was stopped.

        Raises:
            Stopped: The job was stopped.
        """
        if self._stopped.is_set():
            raise Stopped

    def run(self) -> Event:
        """Do the work, and return its last event. An error is one: the model and other jobs go on."""
        try:
            self.check()
            self.tell("started")
            self._work(self)
        except Stopped:
            return {"event": "stopped"}
        except SealignError as error:
            row = {"row": error.row} if isinstance(error, RowError) else {}
            return {"event": "error", "message": str(error), **row}
        except Exception as error:
            _log.exception("a job of the playground failed")
            reason = f"{type(error).__name__}: {first_sentence(error)}"
            return {"event": "error", "message": f"the model failed ({reason}); change the settings and try again"}
        return {"event": "finished"}

    def end(self, event: Event) -> None:
        """Report the last event.

        Args:
            event: Result of ``run``.
        """
        self._put(event)
        self._put(None)

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events until the job has ended."""
        while (event := await self._events.get()) is not None:
            yield event

    def _put(self, event: Event | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the server has ended
            self.stop()


class ModelQueue:
    """Jobs on a model. A job that has to wait is told how many are before it, and again whenever one has ended.

    Args:
        at_once: Number of jobs that run at the same time; more than 1 only where a server runs the model.

    Example:
        >>> async def main():
        ...     queue = ModelQueue()
        ...     job = queue.submit(lambda job: job.tell("half", done=0.5))
        ...     found = [event["event"] async for event in job.events()]
        ...     queue.close()
        ...     return found
        >>> asyncio.run(main())
        ['started', 'half', 'finished']
    """

    def __init__(self, at_once: int = 1) -> None:
        self._at_once = at_once
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._executor = ThreadPoolExecutor(at_once, thread_name_prefix="sealign-model")

    def submit(self, work: Callable[[Job], None]) -> Job:
        """Append a job, from a coroutine, and return it.

        Args:
            work: As for ``Job``.

        Raises:
            ServingError: Too many jobs wait.
        """
        job = Job(work)
        with self._lock:
            if len(self._jobs) >= MAX_JOBS:
                raise ServingError(f"{len(self._jobs)} requests are waiting for the model; try again later")
            self._jobs.append(job)
            self._tell_place(len(self._jobs) - 1)
            self._executor.submit(self._run, job)
        return job

    def close(self) -> None:
        """Stop all jobs and wait for the one that runs."""
        with self._lock:
            for job in self._jobs:
                job.stop()
        self._executor.shutdown()

    def _run(self, job: Job) -> None:
        last = job.run()
        # The job has left the queue before its end is known, so that a request which follows it does not wait.
        with self._lock:
            self._jobs.remove(job)
            for place in range(len(self._jobs)):
                self._tell_place(place)
        job.end(last)

    def _tell_place(self, place: int) -> None:
        ahead = place - self._at_once + 1
        if ahead > 0:
            self._jobs[place].tell("waiting", ahead=ahead)
