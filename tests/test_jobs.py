"""Jobs on local processes and on Ray: results, exceptions, and that nothing is left behind
however the command ends.

Run: pytest tests/test_jobs.py
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import jobs as module
from support.jobs import Stopped, check_cluster, run_command, run_jobs

TESTS = Path(__file__).resolve().parent
LONG = 100  # seconds until a test gives up, on a machine that does other things too
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


class Wrong(ValueError):
    """An exception of a job."""


# ----------------------------------------------------------------------------------------- the jobs
def square(job, alive):
    """A number, squared after some seconds."""
    number, seconds = job
    time.sleep(seconds)
    alive()
    return number, number**2, os.getpid(), torch.get_num_threads()


def patient(job, alive):
    """Works until it is asked to stop: leaves NAME.started, with its process's id, NAME.stopped."""
    folder, name, what = job
    (folder / f"{name}.started").write_text(str(os.getpid()))
    if what:
        until(lambda: (folder / "go").exists())
    if what == "raise":
        raise Wrong("the third", 3)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(LONG * 50):
            time.sleep(0.02)
            alive()
    except Stopped:
        (folder / f"{name}.stopped").touch()
        raise


def raising(job, alive):
    if job:
        raise Wrong(job, 3)


def until(condition):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def gone(process):
    """Whether a process has ended (a dead one that nobody has asked for counts)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def names(folder, end):
    return sorted(path.stem for path in folder.glob(f"*.{end}"))


def workers(folder):
    return [int(path.read_text()) for path in folder.glob("*.started") if path.read_text()]


# ---------------------------------------------------------------------------------- local processes
def test_results_are_in_order_whatever_finishes_first():
    ticks = []
    todo = ((n, seconds) for n, seconds in enumerate([2.5, 0.0, 0.6, 0.0, 0.1]))
    results = run_jobs(square, todo, 2, watch=lambda: ticks.append(time.monotonic()))
    assert [(n, squared) for n, squared, *_ in results] == [(n, n * n) for n in range(5)]
    processes = {process for *_, process, _ in results}
    assert os.getpid() not in processes and len(processes) <= 2
    # the bytes of a job depend on nothing beside it
    assert {threads for *_, threads in results} == {1}
    assert len(ticks) >= 2 and all(gone(process) for process in processes)


def test_no_jobs_no_results():
    assert run_jobs(square, [], 2) == []


@pytest.mark.parametrize(("what", "count"), [("raise", 2), ("watch", 1)])
def test_exception_reaches_the_caller_and_stops_the_others(tmp_path, what, count):
    def watch():
        if len(workers(tmp_path)) == count:
            (tmp_path / "go").touch()
            if what == "watch":
                raise Wrong("the third", 3)

    todo = [(tmp_path, name, what * (name == "1" and what == "raise")) for name in "01234"]
    with pytest.raises(Wrong) as error:
        run_jobs(patient, todo, count, watch=watch)
    assert type(error.value) is Wrong and error.value.args == ("the third", 3)
    assert all(gone(process) for process in workers(tmp_path))
    started = names(tmp_path, "started")
    # one more may have begun beside the exception
    assert started[:count] == ["0", "1"][:count] and "4" not in started
    noticed = [name for name in started if name != "1" or what == "watch"]
    assert names(tmp_path, "stopped") == noticed


def test_killed_worker_is_one_line(tmp_path):
    def watch():
        if len(workers(tmp_path)) == 2:
            (tmp_path / "go").touch()

    todo = [(tmp_path, name, "die" * (name == "1")) for name in "01234"]
    with pytest.raises(
        OSError, match=r"worker process was killed .*same command continues"
    ) as error:
        run_jobs(patient, todo, 2, watch=watch)
    assert "\n" not in str(error.value)
    until(lambda: all(gone(process) for process in workers(tmp_path)))


# --------------------------------------------------------------------------- a command as a process
def python(text, log, alive=lambda: None, folder="/", **environment):
    return run_command([sys.executable, "-c", text], log, alive, str(folder), environment)


def test_a_command_gives_its_code_and_its_log(tmp_path):
    log = tmp_path / "logs" / "log"
    text = "import os, sys; print(os.getcwd(), os.environ['MINE']); sys.exit('wrong')"
    assert python(text, log, folder=tmp_path, MINE="7") == 1
    assert python("print('again')", log) == 0
    assert sorted(log.read_text().splitlines()) == sorted([f"{tmp_path} 7", "wrong", "again"])
    assert python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", log) == -9


def test_a_command_whose_job_is_to_stop_is_asked_and_waited_for(tmp_path):
    """SIGTERM, on which it may take its time."""
    text = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.3)
    pathlib.Path("ended").touch()
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
pathlib.Path("began").touch()
time.sleep(100)
"""

    def alive():
        if (tmp_path / "began").exists():
            raise Stopped

    with pytest.raises(Stopped):
        python(text, tmp_path / "log", alive, tmp_path)
    assert (tmp_path / "ended").exists()


# ---------------------------------------------------------------------------- the command's own end
COMMAND = """
import sys
from pathlib import Path
from test_jobs import *
try:
    run_jobs(patient, [(Path(sys.argv[1]), name, "") for name in "01234"], 2)
except KeyboardInterrupt:
    print("interrupted")
"""


@contextmanager
def command(folder):
    env = {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1", "PATH": ""}
    line = [sys.executable, "-c", COMMAND, str(folder)]
    child = subprocess.Popen(
        line,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that run in the background ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield child
    finally:  # all of them, workers too
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def children(process):
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in listed.split()]


def test_ctrl_c_ends_command_and_workers(tmp_path):
    with command(tmp_path) as child:
        until(lambda: len(workers(tmp_path)) == 2)
        os.kill(child.pid, signal.SIGINT)
        before = time.monotonic()
        out, err = child.communicate(timeout=LONG)
        assert time.monotonic() - before < 20
    assert (out, err) == ("interrupted\n", "")
    assert all(gone(process) for process in workers(tmp_path))
    assert names(tmp_path, "started") == names(tmp_path, "stopped") == ["0", "1"]


def test_ctrl_c_in_a_terminal_while_workers_start(tmp_path):
    """It reaches the workers too, while they import: they must neither die of it nor print."""

    def importing():  # two workers; multiprocessing has a process of its own
        maps = [Path(f"/proc/{process}/maps").read_text() for process in children(child.pid)]
        return sum("libtorch" in text for text in maps) == 2

    with command(tmp_path) as child:
        until(importing)
        started = children(child.pid)
        os.killpg(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=LONG)
        assert (out, err) == ("interrupted\n", "")
        until(lambda: all(gone(process) for process in started))
    assert names(tmp_path, "started") == names(tmp_path, "stopped")


def test_workers_notice_that_their_command_was_killed(tmp_path):
    """Those that run a job, by `alive`; and none waits for the next one."""
    with command(tmp_path) as child:
        until(lambda: len(workers(tmp_path)) == 2)
        started = children(child.pid)
        assert set(workers(tmp_path)) < set(started) and not any(map(gone, started))
        os.kill(child.pid, signal.SIGKILL)
        until(lambda: all(gone(process) for process in started))
        assert names(tmp_path, "started") == names(tmp_path, "stopped") == ["0", "1"]


# ---------------------------------------------------------------------------------------------- Ray
@pytest.fixture
def findable(monkeypatch):
    """Ray's workers import this file too, and take their turn (Ray would put them last)."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("RAY_worker_niceness", "0")


@needs_ray
def test_ray_gives_the_same(findable):
    ticks = []
    todo = [(n, 0.3 * (n == 0)) for n in range(3)]
    results = run_jobs(square, todo, 1, "local", lambda: ticks.append(0))
    assert [(n, squared) for n, squared, *_ in results] == [(n, n * n) for n in range(3)]
    assert os.getpid() not in {process for *_, process, _ in results}
    assert {threads for *_, threads in results} == {1}
    assert ticks


@needs_ray
def test_ray_raises_the_same(findable):
    with pytest.raises(Wrong) as error:
        run_jobs(raising, ["", "the third", ""], 1, "local")
    assert type(error.value) is Wrong and error.value.args == ("the third", 3)


@needs_ray
def test_ray_names_a_killed_worker(monkeypatch):
    """What Ray raises for one, without the seconds that a cluster takes to start."""
    import ray

    ended = []

    def get(references):
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(
        ray, "remote", lambda **_: lambda work: SimpleNamespace(remote=lambda *job: job)
    )
    monkeypatch.setattr(ray, "wait", lambda waiting, **_: (waiting, []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(
        OSError, match=r"Ray lost a job \(WorkerCrashedError\); the same command continues"
    ) as error:
        run_jobs(raising, ["", ""], 1, "local")
    assert "\n" not in str(error.value) and ended
    # where a job may be lost, the others go on
    monkeypatch.setattr(ray, "get", lambda job: get(job) if job[1] == "a" else job[1])
    lost, kept = run_jobs(raising, ["a", "b"], 1, "local", lost=str)
    assert lost == str(error.value) and kept == "b"


@needs_ray
def test_wrong_address_is_one_line_at_once():
    before = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_cluster(address)
    for wrong in (address, "127.0.0.1:99999"):
        with pytest.raises(ValueError, match=rf"no Ray answers at {wrong} \(.+\)") as error:
            check_cluster(wrong)
        assert "\n" not in str(error.value)
    for other in ("local", "auto", "ray://head:10001"):
        check_cluster(other)
    assert time.monotonic() - before < 60


def test_missing_ray_is_one_line(monkeypatch):
    check_cluster(None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    check_cluster(None)
    with pytest.raises(ValueError, match=r"--cluster needs Ray: pip install") as error:
        check_cluster("local")
    assert "\n" not in str(error.value)
