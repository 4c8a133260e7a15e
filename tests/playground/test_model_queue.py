from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sealign.errors import ServingError, SettingError
from sealign.playground import model_queue
from sealign.playground.model_queue import Event, Job, ModelQueue

Works = dict[str, Callable[[Job], None]]


def run(main: Callable[[ModelQueue], Any]) -> Any:
    async def with_queue() -> Any:
        queue = ModelQueue()
        try:
            return await main(queue)
        finally:
            queue.close()

    return asyncio.run(with_queue())


async def events(job: Job) -> list[Event]:
    return [event async for event in job.events()]


def test_jobs_run_one_at_a_time_in_order_and_are_told_their_place() -> None:
    free, order, running = threading.Event(), [], threading.Lock()

    def work(name: str) -> Callable[[Job], None]:
        def do(_: Job) -> None:
            assert running.acquire(blocking=False)
            assert free.wait(30)
            order.append(name)
            running.release()

        return do

    async def main(queue: ModelQueue) -> list[list[Event]]:
        jobs = [queue.submit(work(name)) for name in "abc"]
        free.set()
        return list(await asyncio.gather(*map(events, jobs)))

    first, second, third = run(main)
    assert order == ["a", "b", "c"]
    assert [event["event"] for event in first] == ["started", "finished"]
    assert second == [{"event": "waiting", "ahead": 1}, {"event": "started"}, {"event": "finished"}]
    assert [event.get("ahead") for event in third] == [2, 1, None, None]


def test_a_job_that_is_stopped_ends_and_one_that_waits_never_starts() -> None:
    started = threading.Event()

    def endless(job: Job) -> None:
        started.set()
        while True:
            job.check()

    async def main(queue: ModelQueue) -> list[list[Event]]:
        jobs = [queue.submit(endless), queue.submit(lambda job: job.tell("ran"))]
        assert await asyncio.to_thread(started.wait, 30)
        jobs[1].stop()
        jobs[0].stop()
        last = queue.submit(lambda job: job.tell("ran"))
        return list(await asyncio.gather(*map(events, [*jobs, last])))

    first, second, third = run(main)
    assert [event["event"] for event in first] == ["started", "stopped"]
    assert [event["event"] for event in second] == ["waiting", "stopped"]
    assert [event["event"] for event in third][-3:] == ["started", "ran", "finished"]


def test_an_error_is_an_event_and_the_queue_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: Job) -> None:
        raise SettingError("strength is 2000; try 1")

    def crash(_: Job) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 bytes")

    async def main(queue: ModelQueue) -> list[list[Event]]:
        return [await events(queue.submit(work)) for work in (refuse, crash, lambda job: None)]

    with caplog.at_level(logging.ERROR):
        refused, crashed, after = run(main)
    assert refused[-1] == {"event": "error", "message": "strength is 2000; try 1"}
    assert crashed[-1]["message"] == (
        "the model failed (RuntimeError: CUDA out of memory); change the settings and try again"
    )
    assert [event["event"] for event in after] == ["started", "finished"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [RuntimeError]  # not the refusal


def test_a_job_that_follows_another_does_not_wait() -> None:
    async def main(queue: ModelQueue) -> list[Event]:
        return [event for _ in range(200) for event in await events(queue.submit(lambda job: None))]

    assert run(main) == [{"event": "started"}, {"event": "finished"}] * 200


def test_too_many_jobs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_queue, "MAX_JOBS", 2)
    free = threading.Event()

    def wait(_: Job) -> None:
        assert free.wait(30)

    async def main(queue: ModelQueue) -> None:
        jobs = [queue.submit(wait) for _ in range(2)]
        with pytest.raises(ServingError, match="2 requests are waiting for the model; try again later"):
            queue.submit(lambda job: None)
        free.set()
        await asyncio.gather(*map(events, jobs))
        await events(queue.submit(lambda job: None))

    run(main)


def test_several_jobs_at_once() -> None:
    together, submitted = threading.Barrier(2), threading.Event()

    def meet(job: Job) -> None:
        together.wait(30)
        job.tell("met")
        assert submitted.wait(30)

    async def main(_: ModelQueue) -> list[list[Event]]:
        queue = ModelQueue(at_once=2)
        jobs = [queue.submit(meet) for _ in range(4)]
        submitted.set()
        found = list(await asyncio.gather(*map(events, jobs)))
        queue.close()
        return found

    first, second, third, fourth = run(main)
    assert first == second == [{"event": "started"}, {"event": "met"}, {"event": "finished"}]
    assert third[0] == {"event": "waiting", "ahead": 1}
    assert fourth[0] == {"event": "waiting", "ahead": 2}
    assert third[-1] == fourth[-1] == {"event": "finished"}


def test_closing_stops_what_runs() -> None:
    def endless(job: Job) -> None:
        while True:
            job.check()

    async def main(queue: ModelQueue) -> list[Event]:
        job = queue.submit(endless)
        await asyncio.to_thread(queue.close)
        return await events(job)

    assert run(main)[-1] == {"event": "stopped"}
