"""jobs.py: independent pieces of work on local processes or on a Ray cluster (tasks, seeds).

in : a function and its jobs          out: their results, in order
Service code: nothing of the paper is here.

The function gets `(job, alive)`. A long one calls `alive()` now and then, between two writes: it
raises `Stopped` when the command that started the job is gone or was asked to stop. What the job
keeps on disk makes the next start continue. It runs with the same arguments wherever it is, and on
one thread: the bytes it writes do not depend on how many run beside it, or where.

Not joblib: at an exception or Ctrl-C it kills its workers in the middle of a write, those of a
killed command stay for minutes, and nothing can be called while it waits.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from support.files import progress

Work = Callable[[Any, Callable[[], None]], Any]  # (job, alive) -> result


class Stopped(Exception):
    """Raised inside a job whose command has ended."""


# -------------------------------------------------------------------------------------- in a worker
_stop_asked: Any = None  # the event by which the command asks its workers to end
_job_in_hand = threading.Lock()  # held while a job runs


def _begin_worker(stop_asked) -> None:
    """The first thing in every worker."""
    global _stop_asked
    _stop_asked = stop_asked
    # A terminal sends Ctrl-C to all of a command's processes; the command alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_command, daemon=True).start()


def _command():
    """The process that started this worker."""
    command = multiprocessing.parent_process()
    assert command is not None, "only workers have one"
    return command


def _end_with_command() -> None:
    """A worker of a killed command would wait for its next job for ever."""
    _command().join()
    with _job_in_hand:  # the job notices by `alive`, between two writes
        os._exit(1)


def _alive() -> None:
    if _stop_asked.is_set() or not _command().is_alive():
        raise Stopped


def _run_here(work: Work, job):
    with _job_in_hand:
        _alive()  # the job may have waited in the pool's queue meanwhile
        return work(job, _alive)


def run_command(
    line: list[str], log: Path, alive: Callable[[], None], folder: str, environment: dict[str, str]
) -> int:
    """A command as a process of its own, in `folder`; its exit code, < 0 of one that was killed.

    What it prints goes behind what is in `log`. A job that is asked to stop asks it too (SIGTERM),
    and waits until it has.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(line, cwd=folder, env=os.environ | environment, **pipes)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.5)
                alive()
        finally:
            process.terminate()  # nothing where it has ended
            process.wait()


def _run_on_cluster(work: Work, job):
    torch.set_num_threads(1)
    return work(job, lambda: None)  # Ray ends its workers itself


# ----------------------------------------------------------------------------------- in the command
def run_jobs(
    work: Work,
    jobs: Iterable,
    workers: int,
    cluster: str | None = None,
    watch: Callable[[], object] = lambda: None,
    lost: Callable[[OSError], Any] | None = None,
) -> list:
    """`work` on every job; `watch` is called every second meanwhile (progress bars).

    `workers` local processes, or all of the Ray cluster at `cluster` (`local` starts one here).
    An exception of a job ends everything and is raised here, at once; so does Ctrl-C, after the
    jobs have noticed. Raises OSError with one line when a worker was killed; on a cluster, where
    machines come and go, `lost(error)` is that job's result instead, if it is given.
    """
    jobs = list(jobs)
    if cluster:
        return _run_jobs_on_ray(work, jobs, cluster, watch, lost)
    # Fresh interpreters: a fork would copy the threads' locks of torch in whatever state they are.
    context = multiprocessing.get_context("spawn")
    stop_asked = context.Event()
    workers = max(1, min(workers, len(jobs)))
    with ProcessPoolExecutor(workers, context, _begin_worker, (stop_asked,)) as pool:
        try:
            # Ctrl-C waits while workers start: they would die of it before they can ignore it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(_run_here, work, job) for job in jobs]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=1)
                watch()
                for future in done:
                    future.result()  # raises what the job raised
        except BrokenProcessPool:
            raise OSError(
                "a worker process was killed (out of memory?); the same command continues"
            ) from None
        except BaseException:
            stop_asked.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


@contextmanager
def bar_of(
    done: Callable[[], int], total: int, title: str, unit: str, quiet: bool
) -> Iterator[Callable[[], object]]:
    """A progress bar that asks `done` how far the work is; gives what `run_jobs` takes as `watch`.

    Files are counted, not jobs: a stopped run's are there already, and one job may write many.
    """
    initial = done()
    with progress(total=total, initial=initial, desc=title, unit=unit, disable=quiet) as bar:
        yield lambda: bar.update(done() - bar.n)


def _run_jobs_on_ray(
    work: Work,
    jobs: list,
    cluster: str,
    watch: Callable[[], object],
    lost: Callable[[OSError], Any] | None,
) -> list:
    import ray

    # Ray's workers import this project from where it is: a path that all machines see.
    project = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (project, os.environ.get("PYTHONPATH"))))
    quiet = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    ray.init(cluster, runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
    try:
        # No retries: a job that fails is one line and a new start, as it is locally.
        remote = ray.remote(num_cpus=1, max_retries=0)(_run_on_cluster)
        references = [remote.remote(work, job) for job in jobs]
        waiting, results = references, {}
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1)
            watch()
            for reference in done:
                try:
                    results[reference] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # what the job raised
                except ray.exceptions.RayError as error:
                    why = f"Ray lost a job ({type(error).__name__}); the same command continues"
                    if lost is None:
                        raise OSError(why) from None
                    results[reference] = lost(OSError(why))
        return [results[reference] for reference in references]
    finally:
        ray.shutdown()


def check_cluster(cluster: str | None) -> None:
    """Raises ValueError with one line when Ray is asked for and missing, or does not answer."""
    if cluster and find_spec("ray") is None:
        raise ValueError("--cluster needs Ray: pip install 't2mir[ray]'")
    host, _, port = (cluster or "").rpartition(":")
    if port.isdigit() and "/" not in host:  # host:port; Ray knows the other forms itself
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"--cluster: no Ray answers at {cluster} ({error})") from None
