"""jobs.py: independent pieces of work on local processes or on a Ray cluster (tasks and seeds do not need each other).

in : a function and its jobs          out: their results, in order
The function gets `(job, alive)`; long ones call `alive()` now and then, which raises `Stopped` when the command
that started them is gone or was asked to stop. What they keep on disk makes the next start continue. The same
function runs with the same arguments wherever it is, on one thread: the bytes it writes do not depend on how many
run beside it, or where.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path

import torch

Work = Callable[[object, Callable[[], None]], object]
_stop = None  # in a worker: the event that asks it to end
_busy = threading.Lock()  # in a worker: held while a job runs


class Stopped(Exception):
    """Raised inside a job whose command has ended."""


def _begin(stop) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End with the command: a worker of a killed one would wait for its next job for ever."""
    multiprocessing.parent_process().join()
    with _busy:  # the job in hand notices by `alive`, between two writes
        os._exit(1)


def _alive() -> None:
    if _stop.is_set() or not multiprocessing.parent_process().is_alive():
        raise Stopped


def _local(work: Work, job) -> object:
    with _busy:
        _alive()  # it may have waited in the pool's queue
        return work(job, _alive)


def _remote(work: Work, job) -> object:
    torch.set_num_threads(1)
    return work(job, lambda: None)  # Ray ends its workers itself


def run_jobs(
    work: Work,
    jobs: Iterable,
    workers: int,
    cluster: str | None = None,
    watch: Callable[[], None] = lambda: None,
) -> list:
    """`work` on every job; `watch` is called every second meanwhile (progress bars).

    `workers` local processes, or all of the Ray cluster at `cluster` (`local` starts one here). An exception of a job
    ends everything and is raised here; so does Ctrl-C, after the jobs have noticed.
    """
    jobs = list(jobs)
    if cluster:
        return _run_on_ray(work, jobs, cluster, watch)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(max(1, min(workers, len(jobs))), context, _begin, (stop,)) as pool:
        try:
            mask = signal.pthread_sigmask(
                signal.SIG_BLOCK, {signal.SIGINT}
            )  # as workers start, it would kill them
            try:
                futures = [pool.submit(_local, work, job) for job in jobs]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=1)
                watch()
                for future in done:
                    future.result()  # raises what the job raised, at once
        except BrokenProcessPool:
            raise OSError(
                "a worker process was killed (out of memory?); the same command continues"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _run_on_ray(work: Work, jobs: list, cluster: str, watch: Callable[[], None]) -> list:
    import ray

    here = str(Path(__file__).resolve().parent)  # on a cluster: a path that all machines see
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    quiet = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    ray.init(cluster, runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(_remote)
        waiting = references = [remote.remote(work, job) for job in jobs]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1)
            watch()
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise OSError(
                    f"Ray lost a job ({type(error).__name__}); the same command continues"
                ) from None
        return ray.get(references)
    finally:
        ray.shutdown()


def check_cluster(cluster: str | None) -> None:
    """Raises ValueError with one line when Ray is asked for and missing, or when nobody answers at its address."""
    if cluster and find_spec("ray") is None:
        raise ValueError("--cluster needs Ray: pip install 't2mir[ray]'")
    host, _, port = (cluster or "").rpartition(":")
    if port.isdigit() and "/" not in host:
        try:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"--cluster: no Ray answers at {cluster} ({error})") from None
