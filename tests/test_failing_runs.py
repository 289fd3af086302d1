"""Experiments in which something fails, is damaged, or is not what it was.

Run: pytest tests/test_failing_runs.py
"""

from contextlib import ExitStack
from dataclasses import replace
from shutil import copy

import pytest
import torch
from commands import ROOT, at_home, contents, rewrite, run, table
from tiny_experiment import but, names, planned

from collect import dataset_folder
from experiments import runs
from experiments.runs import _one_gpu, finished, read_record
from reproduce import Reproduction, plan
from support import jobs

RESULTS = "results/paper/table1"


def test_a_failing_run_is_named_and_the_others_are_finished(tiny, tmp_path, monkeypatch, capsys):
    argv = [*tiny, "--seeds", "0", "1"]
    wrong = names(argv)[0]
    strange = tmp_path / "runs" / "paper" / wrong / "note.txt"
    strange.parent.mkdir(parents=True)
    strange.write_text("somebody else's")
    with at_home():
        ended = run("reproduce.py", argv, monkeypatch, capsys)
    (line,) = [text for text in ended.err.splitlines() if text.startswith("failed: ")]
    assert ended.code == 1 and "Traceback" not in ended.err
    assert line.startswith(f"failed: {wrong}: ") and "is not a t2mir run" in line
    results = tmp_path / "results" / "paper" / "table1"
    assert table(results)[0]["seeds"] == "1" and "[" in (results / "table.md").read_text()

    strange.unlink()
    with at_home():
        ended = run("reproduce.py", argv, monkeypatch, capsys)
    assert ended.code == 0 and "2 runs, 1 finished" in ended.out, ended.err
    assert table(results)[0]["seeds"] == "0 1"


def test_what_was_run_with_other_settings_is_named_and_kept(tiny, tmp_path, monkeypatch, capsys):
    """The names of runs say what differs from the preset: of an older preset they are the same."""
    argv = [*tiny, "--seeds", "0"]
    with at_home():
        assert run("reproduce.py", argv, monkeypatch, capsys).code == 0
    results = tmp_path / "results" / "paper" / "table1"
    (record,) = results.glob("*.json")
    rewrite(record, lambda content: content["settings"].update(lr=0.5))
    before = contents(tmp_path)
    for more in ([], ["--minutes", "0"]):
        with at_home():
            ended = run("reproduce.py", [*argv, *more], monkeypatch, capsys)
        assert "(lr 0.5 -> 0.001)" in ended.error and "another --results" in ended.error
        assert contents(tmp_path) == before

    record.unlink()  # how the run was played does not matter: it is played anew
    config = tmp_path / "runs" / "paper" / names(argv)[0] / "config.json"
    rewrite(config, lambda content: content["settings"]["play"].update(episodes=7))
    with at_home():
        assert run("reproduce.py", argv, monkeypatch, capsys).code == 0
    assert read_record(record)["settings"]["episodes"] == 2

    record.unlink()  # the run itself is of other settings
    rewrite(config, lambda content: content["settings"]["training"].update(lr=0.5))
    with at_home():
        ended = run("reproduce.py", argv, monkeypatch, capsys)
    assert ended.code == 1 and "was trained with other settings (lr 0.5 -> 0.001)" in ended.err
    assert not record.exists()


def test_a_dataset_that_cannot_be_made_fails_its_runs_alone(tiny, tmp_path, monkeypatch, capsys):
    """Its folder is a file."""
    argv = [*but(tiny, f"datasets={tmp_path / 'data'}"), "--seeds", "0"]
    (tmp_path / "data").mkdir()
    dataset_folder(planned(argv)[0].cfg.collection).write_text("no folder")
    with at_home():
        ended = run("reproduce.py", argv, monkeypatch, capsys)
    assert ended.code == 1 and f"failed: {names(argv)[0]}: " in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_damaged_evaluation_is_made_anew_beside_a_run_that_fails(
    tiny, tmp_path, monkeypatch, capsys
):
    argv = [*tiny, "--seeds", "0", "1"]
    with at_home():
        assert run("reproduce.py", argv, monkeypatch, capsys).code == 0
    before = table(tmp_path / RESULTS)
    record = tmp_path / RESULTS / f"{names(argv)[0]}.json"
    file = record.parent / read_record(record)["csv"]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    (tmp_path / RESULTS / f"{names(argv)[1]}.json").unlink()
    with monkeypatch.context() as patch, at_home():
        patch.setattr(runs, "work", lambda job, alive: "it cannot be")
        ended = run("reproduce.py", argv, patch, capsys)
    assert ended.code == 1 and "2 runs, 0 finished" in ended.out
    assert [line.split(": ")[1] for line in ended.err.splitlines() if "failed" in line] == list(
        names(argv).values()
    )
    with at_home():
        assert run("reproduce.py", argv, monkeypatch, capsys).code == 0
    assert file.read_bytes() == whole and table(tmp_path / RESULTS) == before


def test_failures_are_named_also_where_no_table_can_be_made(tiny, tmp_path, monkeypatch, capsys):
    """An old record without a checksum promises a CSV that is none."""
    argv = [*tiny, "--seeds", "0", "1"]
    with at_home():
        assert run("reproduce.py", argv, monkeypatch, capsys).code == 0
    record = tmp_path / RESULTS / f"{names(argv)[0]}.json"
    rewrite(record, lambda content: content.pop("csv_sum"))
    (record.parent / read_record(record)["csv"]).write_text("task,episode,return\n")
    (tmp_path / RESULTS / f"{names(argv)[1]}.json").unlink()
    with monkeypatch.context() as patch, at_home():
        patch.setattr(runs, "work", lambda job, alive: "it cannot be")
        ended = run("reproduce.py", argv, patch, capsys)
    assert ended.code == 1 and f"failed: {names(argv)[1]}: it cannot be\n" in ended.err
    assert "is not an evaluation" in ended.err


def test_another_evaluation_in_its_place_is_no_finished_run(tiny, tmp_path, monkeypatch, capsys):
    """evaluate.py, told to write into the experiment's folder, plays each task once."""
    argv = [*tiny, "--seeds", "0"]
    with at_home():
        assert run("reproduce.py", argv, monkeypatch, capsys).code == 0
    job = replace(planned(argv)[0].job, repeats=2)
    assert finished(job)
    folder = f"runs/paper/{names(argv)[0]}"
    assert run("evaluate.py", [folder, "--results", RESULTS], monkeypatch, capsys).code == 0
    assert not finished(job)
    before = contents(tmp_path)
    with at_home():
        ended = run("reproduce.py", [*argv, "--repeats", "3"], monkeypatch, capsys)
    assert "(repeats 2 -> 3)" in ended.error and contents(tmp_path) == before


def test_two_files_of_one_name_are_refused_and_two_paths_of_one_file_are_not(
    tiny, tmp_path, monkeypatch, capsys
):
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
        copy(ROOT / "tests" / "forks" / "bc.py", tmp_path / folder / "bc.py")
    line = ["table1", "--envs", "darkroom", "--seeds", "0", "--preset", "cpu", "--minutes", "0"]
    ended = run(
        "reproduce.py", [*line, "--backbones", "mine/bc.py", "other/bc.py"], monkeypatch, capsys
    )
    assert "two runs have one name, darkroom-bc-" in ended.error
    assert "backbone mine/bc.py -> other/bc.py" in ended.error

    command = Reproduction("table1", ("darkroom",), ("mine/bc.py",), seeds=(0,), preset="cpu")
    one, absolute, other = (
        plan(replace(command, backbones=(path,)))[0][0].job
        for path in ("mine/bc.py", str(tmp_path / "mine" / "bc.py"), "other/bc.py")
    )
    assert runs.other_settings(absolute, one.settings) == []
    assert runs.other_settings(other, one.settings) == ["backbone mine/bc.py -> other/bc.py"]


def test_a_method_that_breaks_has_no_trial_and_the_others_go_on(
    tiny, tmp_path, monkeypatch, capsys
):
    broken = (ROOT / "tests" / "forks" / "bc.py").read_text()
    assert "def sample(" in broken
    (tmp_path / "broken.py").write_text(broken.replace("def sample(", "def sampled("))
    argv = [*tiny, "--seeds", "0", "--trial", "1"]
    at = argv.index("dpt")
    argv = [*argv[:at], "broken.py", *argv[at:]]
    with at_home():
        ended = run("reproduce.py", argv, monkeypatch, capsys)
    assert ended.code == 1 and "darkroom, broken, T2MIR: no trial" in ended.out, ended.out
    assert "projected: " in ended.out and len(table(tmp_path / RESULTS)) == 1


def test_every_job_has_a_place_on_a_gpu(tmp_path, monkeypatch):
    """Three jobs on two GPUs; a place is free again when its job ends."""

    def asked():
        pass

    def stopping():
        raise jobs.Stopped

    command = Reproduction("table1", ("darkroom",), ("dpt",), seeds=(0,), preset="cpu")
    job = replace(plan(command)[0][0].job, here=str(tmp_path), gpus=2, slots=3)
    monkeypatch.setattr(runs, "PATIENCE", 0)
    monkeypatch.setattr(runs.time, "sleep", lambda _: None)
    for given, want in (("", "0 1 0"), ("5,3", "5 3 5")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        with ExitStack() as stack:
            found = [
                stack.enter_context(_one_gpu(job, asked))["CUDA_VISIBLE_DEVICES"] for _ in "abc"
            ]
            with pytest.raises(OSError, match="all places"), _one_gpu(job, asked):
                pass
            with (
                pytest.raises(jobs.Stopped),
                _one_gpu(job, stopping),
            ):  # it waits, and may be stopped
                pass
            assert found == want.split()
        with _one_gpu(job, asked) as environment:
            assert environment == {"CUDA_VISIBLE_DEVICES": want.split()[0]}
    with _one_gpu(replace(job, gpus=0), asked) as environment:
        assert environment == {"OMP_NUM_THREADS": "1"}


def test_a_certain_gpu_is_refused(monkeypatch):
    """Runs are spread over those there are; each sees its own as the first."""
    monkeypatch.setattr("reproduce.resolve_device", torch.device)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    command = Reproduction("table1", ("darkroom",), ("dpt",), preset="cpu", set=("device=cuda:1",))
    with pytest.raises(ValueError, match="device=cuda:1: a run takes any GPU") as error:
        plan(command)
    assert "\n" not in str(error.value)
    jobs_of = plan(replace(command, set=("device=cuda",)))[0]
    assert {run.job.gpus for run in jobs_of} == {2}
