"""How anything is written: whole or not at all, same content same bytes, one process a folder,
room on the disk; and an optimizer's moments there and back.

Run: pytest tests/test_files.py
"""

import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from teaching import one_line

from support import files
from support.files import (
    Damaged,
    load_optimizer,
    load_tensors,
    need_space,
    only_writer,
    optimizer_tensors,
    save_arrays,
    save_tensors,
    write_atomically,
)

ABOUT = {
    "t2mir": "1",
    "kind": "test",
    "step": "64",
    "settings": '{"lr": 0.1, "name": "ü"}',
    "zeta": "",
    "alpha": "a b",
}
TESTS = Path(__file__).resolve().parent


def tensors():
    rng = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 5, generator=rng),
        "a.step": torch.tensor(7.0),
        "turned": torch.randn(4, 6, generator=rng).T,  # not contiguous
        "grad": torch.randn(2, 1, generator=rng).requires_grad_(),
        "count": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }


def process(code, *args, hash_seed="0"):
    """Python code in a fresh process that finds files.py and this file."""
    env = {
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
        "OMP_NUM_THREADS": "1",
        "PATH": "",
        "PYTHONHASHSEED": hash_seed,
    }
    line = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(
        line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# ------------------------------------------------------------------------------------------ tensors
def test_tensors_and_header_come_back(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    save_tensors(path, tensors(), ABOUT)
    loaded, about = load_tensors(path)
    assert about == ABOUT
    assert loaded.keys() == tensors().keys()
    for name, value in tensors().items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype, name
        assert loaded[name].zero_().count_nonzero() == 0  # it can be written to
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_others_can_read_it(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), ABOUT)
    with safe_open(path, framework="pt") as file:
        assert {**ABOUT, "crc": file.metadata()["crc"]} == file.metadata()
        assert set(file.keys()) == set(tensors())
        for name, value in tensors().items():
            assert torch.equal(file.get_tensor(name), value), name
    blob = path.read_bytes()
    assert int.from_bytes(blob[:8], "little") % 8 == 0  # the format wants the tensors aligned


def test_same_content_same_bytes(tmp_path):
    """In any process: the library's own writer orders the header by a hash that is seeded anew."""
    code = "import sys; from pathlib import Path; from test_files import *; "
    code += "[save_tensors(Path(sys.argv[1]) / f'{i}', tensors(), ABOUT) for i in range(4)]"
    for name, seed in (("one", "1"), ("two", "2")):
        child = process(code, tmp_path / name, hash_seed=seed)
        assert child.communicate(timeout=100)[1] == "" and child.returncode == 0
    blobs = {path.read_bytes() for path in tmp_path.glob("*/*")}
    assert len(list(tmp_path.glob("*/*"))) == 8 and len(blobs) == 1
    save_tensors(tmp_path / "x", tensors(), {**ABOUT, "step": "65"})
    assert (tmp_path / "x").read_bytes() not in blobs


def test_any_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), ABOUT)
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    assert len(blob) - start > 200
    for place in range(len(blob)):  # of the header too: names, places, what is said about them
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 0x10]) + blob[place + 1 :])
        with pytest.raises(ValueError, match="damaged") as error:
            load_tensors(path)
        one_line(error, path)
    path.write_bytes(blob)
    load_tensors(path)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1, -60])
def test_truncated_file_is_refused(tmp_path, length):
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), ABOUT)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="damaged") as error:
        load_tensors(path)
    one_line(error, path)


@pytest.mark.parametrize("about", [None, {}, {"step": "3"}, {"crc": "12"}])
def test_foreign_tensors_are_refused(tmp_path, about):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3)}, path, metadata=about)
    with pytest.raises(ValueError, match="checksum") as error:
        load_tensors(path)
    one_line(error, path)


@pytest.mark.parametrize(
    "content", [b"no tensors\nat all", b"{}" * 500, np.zeros(99).tobytes(), None]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Damaged, match=r"damaged|missing") as error:
        load_tensors(path)
    one_line(error, path)


def test_arrays_come_back_and_same_content_same_bytes(tmp_path, monkeypatch):
    arrays = {
        "b": np.arange(6.0).reshape(2, 3),
        "a": np.zeros(1000, np.int64),
        "flags": np.array([True]),
    }
    save_arrays(tmp_path / "one.npz", arrays)
    later = time.localtime(time.time() + 1e6)
    monkeypatch.setattr(
        time, "localtime", lambda *_: later
    )  # a zip file has room for its members' time
    save_arrays(tmp_path / "two.npz", arrays)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert (tmp_path / "one.npz").stat().st_size < 2000
    with np.load(tmp_path / "one.npz", allow_pickle=False) as file:
        assert file.files == list(arrays)
        for name, value in arrays.items():
            np.testing.assert_array_equal(file[name], value, strict=True)


# --------------------------------------------------------------------------------------- optimizers
SHAPES = ((3, 5), (5,), (), (2, 1))


def stepped(steps, seed=0, **options):
    """An optimizer after some steps; its last parameter never has a gradient."""
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=rng, requires_grad=True) for shape in SHAPES]
    optimizer = torch.optim.AdamW(weights, 1e-2, **options)
    walk(optimizer, rng, steps)
    return optimizer, rng


def walk(optimizer, rng, steps):
    weights = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        for weight in weights[:-1]:
            weight.grad = torch.randn(weight.shape, generator=rng)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_continues_from_its_file_as_if_it_had_not_stopped(tmp_path, steps, fused):
    """Weights and later steps are equal bit for bit; the file's other tensors are left alone."""
    one, rng = stepped(steps, fused=fused)
    moments = optimizer_tensors(one, "adam")
    assert sorted(moments) == sorted(
        f"adam.{i}.{name}" for i in range(3) for name in ("step", "exp_avg", "exp_avg_sq") if steps
    )
    save_tensors(tmp_path / "x", moments | {"adamant.0.step": torch.ones(7)}, {})
    two, _ = stepped(1, seed=1, fused=fused)  # had other moments
    with torch.no_grad():
        for mine, weight in zip(*(o.param_groups[0]["params"] for o in (two, one)), strict=True):
            mine.copy_(weight)
    load_optimizer(two, "adam", load_tensors(tmp_path / "x")[0])
    again = torch.Generator()
    again.set_state(rng.get_state())
    for a, b in zip(walk(one, rng, 3), walk(two, again, 3), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_optimizer_shares_no_memory_with_the_tensors():
    one, rng = stepped(2)
    two, _ = stepped(0)
    load_optimizer(two, "x", optimizer_tensors(one, "x"))
    before = {key: value.clone() for key, value in optimizer_tensors(one, "x").items()}
    walk(two, rng, 2)
    assert all(
        torch.equal(before[key], value) for key, value in optimizer_tensors(one, "x").items()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adam.1.exp_avg": None}, r"adam\.1\.exp_avg is missing"),
        ({"adam.0.step": None, "adam.2.step": None}, r"adam\.0\.step is missing"),
        (
            {"adam.0.exp_avg": torch.zeros(5, 3)},
            r"adam\.0\.exp_avg has shape \(5, 3\), not \(3, 5\)",
        ),
        ({"adam.1.exp_avg_sq": torch.tensor(1.0)}, r"exp_avg_sq has shape \(\), not \(5,\)"),
        ({"adam.2.step": torch.zeros(3)}, r"adam\.2\.step has shape \(3,\), not \(\)"),
        ({"adam.4.step": torch.tensor(1.0)}, r"adam\.4\.step is of none of the 4 parameters"),
        ({"adam.actor.0.step": torch.tensor(1.0)}, "is of none of the 4 parameters"),
    ],
)
def test_moments_that_do_not_fit_are_refused_in_one_line(changes, message):
    one, _ = stepped(3)
    changed = optimizer_tensors(one, "adam") | changes
    two, _ = stepped(1, seed=1)
    before = optimizer_tensors(two, "adam")
    with pytest.raises(ValueError, match=message) as error:
        load_optimizer(two, "adam", {k: v for k, v in changed.items() if v is not None})
    one_line(error)
    assert all(value is before[key] for key, value in optimizer_tensors(two, "adam").items())


# ------------------------------------------------------------------------------------- whole or not
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_has_the_mode_that_the_umask_says(tmp_path, umask):
    old = os.umask(umask)
    try:
        save_tensors(tmp_path / "tensors", tensors(), ABOUT)
        save_arrays(tmp_path / "arrays", {"a": np.zeros(3)})
        write_atomically(tmp_path / "text", lambda temporary: temporary.write_text("text"))
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        assert path.read_text() == "old" and temporary.parent == path.parent
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_new_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "x"

    def write(temporary):
        temporary.write_text("ha")
        assert not path.exists()
        temporary.write_text("half and the rest")

    write_atomically(path, write)
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("x", "half and the rest")]


def test_failing_arrays_leave_nothing(tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        save_arrays(tmp_path / "x.npz", {"a": np.zeros(3)})
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- one writer
HOLD = """
import sys, time
from pathlib import Path
from support.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    print(time.monotonic(), flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds tmp_path / "run" for so many seconds."""
    children = []

    def start(seconds):
        children.append(process(HOLD, tmp_path / "run", seconds))
        assert children[0].stdout.readline() == "held\n"
        return children[0]

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_second_process_is_refused_until_the_first_is_killed(tmp_path, holder):
    child = holder(1000)
    with (
        pytest.raises(ValueError, match="another process is writing") as error,
        only_writer(tmp_path / "run"),
    ):
        pass
    one_line(error, tmp_path / "run")
    before = time.monotonic()
    with (
        pytest.raises(ValueError, match="another process"),
        only_writer(tmp_path / "run", seconds=0.5),
    ):
        pass
    assert time.monotonic() - before >= 0.5
    with only_writer(tmp_path / "other"):  # another folder is free
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with only_writer(tmp_path / "run"):
        pass


def test_waits_for_the_first_to_end(tmp_path, holder):
    child = holder(1.5)
    with only_writer(tmp_path / "run", seconds=100):
        now = time.monotonic()
        assert float(child.communicate(timeout=100)[0]) <= now


def test_lock_is_left_however_the_block_ends(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), only_writer(tmp_path / "run"):
            with pytest.raises(ValueError, match="another process"), only_writer(tmp_path / "run"):
                pass
            raise KeyError
    with only_writer(tmp_path / "run"):
        pass


# --------------------------------------------------------------------------------------------- room
def test_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    asked = []

    def usage(place):
        asked.append(Path(place))
        return namedtuple("usage", "total used free")(10e9, 8e9, 2e9)

    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    folder = tmp_path / "not" / "there" / "yet"
    need_space(folder, 2e9)
    with pytest.raises(
        ValueError, match=r"about 2\.50GB, and 2\.00GB are free: make room"
    ) as error:
        need_space(folder, 2.5e9)
    one_line(error, folder)
    assert asked == [tmp_path] * 2 and not (tmp_path / "not").exists()


def test_room_of_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    need_space(Path("new/folder"), 1)
    with pytest.raises(ValueError, match="make room"):
        need_space(Path("new/folder"), 1e18)
