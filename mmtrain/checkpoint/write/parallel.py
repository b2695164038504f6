"""Runs a few jobs in threads and waits for all of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def submit(pool: ThreadPoolExecutor, job: Callable[[], T]) -> "Future[T]":
    """Give a job to the pool, or run it here when the interpreter is exiting and its pools take no more work."""
    try:
        return pool.submit(job)
    except RuntimeError:
        done: Future[T] = Future()
        done.set_result(job())
        return done


def run_all(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run all jobs and return their results in order. The first failure is raised once all have ended."""
    futures = [submit(pool, job) for job in jobs]
    failures = [future.exception() for future in futures]
    for failure in failures:
        if failure is not None:
            raise failure
    return [future.result() for future in futures]
