"""Whatever is typed or written into a JSON file: one line or a run, never a traceback or an escape.

Hypothesis draws values for every setting, and changes for every place of config.json, meta.json and
a file of tasks; the checksums fit, as if somebody meant it. Run: pytest tests/test_properties.py
"""

import json
import os
import shutil
import types
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import contents, rewrite
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import command
from tiny import settings as tiny_settings

import train
from collect import dataset_folder
from data import load_dataset
from envs import split_tasks
from evaluate import Evaluation, variant
from support import checkpoint
from support.command_line import in_one_line, parse_collection, parse_config, parse_evaluation

OFTEN = settings(
    max_examples=int(os.environ.get("EXAMPLES", "60")),  # EXAMPLES=2000 for a hunt
    deadline=None,
    derandomize=True,  # the same examples in every run: a failure is there again
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# small ones that may well be accepted, and those that no machine can hold
whole = st.integers(-3, 24) | st.sampled_from([2**31, 10**12, 10**13, 2**63, -(2**70), 10**24])
real = st.floats() | st.sampled_from([0.0, -0.0, 1e-320, 1e30, 1.0, -1.0])
words = st.text(max_size=20) | st.sampled_from(
    ["", ".", "..", "/", "../../x", "\0", "a\nb", "x" * 300, "cuda", "meta", "~", "*", "ad", "nan"]
)
plain = st.recursive(
    st.none() | st.booleans() | whole | real | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mended(work):
    """What `work` gives; None where it ends as a command does that somebody can mend."""
    try:
        return work()
    except SystemExit as end:  # tyro's message: a value that is no number, or no choice
        assert end.code == 2
    except (Exception, KeyboardInterrupt) as error:
        said = in_one_line(error, "")
        if said is None:
            raise
        assert "\n" not in said
    return None


@cache
def numeric_and_text() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of all settings of a run on a tiny dataset, by what they hold."""
    from config import Collection

    held = tiny_settings(Collection(), "dpt")
    numbers = tuple(
        n for n, v in held.items() if isinstance(v, (int, float)) and v not in (True, False)
    )
    numbers += tuple(n for n, v in held.items() if v in (0, 1) and not isinstance(v, bool))
    texts = tuple(n for n, v in held.items() if v is None or isinstance(v, str))
    return tuple(dict.fromkeys(numbers)), texts


def one_step(cfg, folder) -> None:
    """What is accepted trains: a step on a tiny dataset, whatever the collection would be."""
    with torch.random.fork_rng():
        method = train.make_method(cfg, torch.device("cpu"))
        dataset = load_dataset(folder)
        batch = train.draw(method, dataset, torch.Generator().manual_seed(0))
        train.set_learning_rate(method, 0)
        train.training_step(method, batch)


@OFTEN
@given(data=st.data())
@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_numbers_on_the_command_line(tiny_config, paper_folder, here, backbone, data):
    name = data.draw(st.sampled_from(numeric_and_text()[0]))
    value = data.draw(whole | real)
    argv = [*command(tiny_config, "run", backbone, steps=5), f"--{name.replace('_', '-')}={value}"]
    cfg = mended(lambda: parse_config(argv))
    if cfg is not None:
        mended(lambda: dataset_folder(cfg.collection))
        if cfg.training.prompt_length <= 1000 and cfg.training.batch < 10**5:
            mended(lambda: one_step(cfg, paper_folder))
    assert list(here.iterdir()) == []


@OFTEN
@given(data=st.data())
def test_texts_on_the_command_line(tiny_config, here, data):
    name = data.draw(st.sampled_from(numeric_and_text()[1]))
    argv = [*command(tiny_config, "run"), f"--{name.replace('_', '-')}={data.draw(words)}"]
    cfg = mended(lambda: parse_config(argv))
    if cfg is not None:
        mended(lambda: train.open_run(cfg))
        folder = mended(lambda: dataset_folder(cfg.collection))
        root = Path(cfg.data.datasets).absolute()
        assert folder is None or folder.absolute().parent == root
    assert list(here.iterdir()) == []


@OFTEN
@given(data=st.data())
def test_everything_on_the_other_command_lines(few, here, data):
    """collect.py and evaluate.py: a flag of theirs and any word or number."""
    value = data.draw(whole.map(str) | real.map(str) | words)
    collecting = ["--data-episodes", "--teacher-steps", "--workers", "--tasks", "--export-minari"]
    flag = data.draw(st.sampled_from([*collecting, "--env", "--preset", "--task-seed"]))
    mended(lambda: parse_collection(["--env=point-robot", f"{flag}={value}"]))
    flag = data.draw(st.sampled_from(["--episodes", "--repeats", "--noise", "--prompt", "--split"]))
    mended(lambda: parse_evaluation(Evaluation, [str(few), f"{flag}={value}"]))
    mended(lambda: parse_evaluation(Evaluation, [value]))
    assert list(here.iterdir()) == []


# --------------------------------------------------------------------------------------- JSON files
def changed(content, data) -> None:
    """Another value, or none at all, in one place of a JSON file, however deep."""
    holder = content
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = data.draw(st.sampled_from(list(keys)))
        inner = holder[key]
        if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
            holder = inner
            continue
        if isinstance(holder, dict) and data.draw(st.integers(0, 4)) == 0:
            del holder[key]
        else:
            holder[key] = data.draw(plain)
        return


@OFTEN
@given(data=st.data())
def test_any_change_of_config_json(few, here, data):
    run = shutil.copytree(few, here / "run", dirs_exist_ok=True)
    rewrite(run / "config.json", lambda content: changed(content, data))
    before = contents(here)

    def evaluated():
        method, _ = checkpoint.load_method(run, torch.device("cpu"))
        checkpoint.read_tasks(run, method.cfg.data.env)
        play = types.SimpleNamespace(play=method.cfg.play)
        name = variant(method, play)
        assert "/" not in name and name.isprintable()  # it becomes a file's
        return method.policy(method.cfg.play)

    mended(evaluated)
    assert contents(here) == before


@OFTEN
@given(data=st.data())
def test_any_change_of_meta_json(paper_folder, here, data):
    folder = shutil.copytree(paper_folder, here / "data", dirs_exist_ok=True)
    rewrite(folder / "meta.json", lambda content: changed(content, data))
    before = contents(here)
    mended(lambda: load_dataset(folder))
    assert contents(here) == before


@OFTEN
@given(content=plain, train=plain, test=plain)
@example(content=0, train=[[0, 0]], test=[[True, 1]])
@example(content=0, train=[[0, 0]], test=[[2**64, -(10**400)]])
def test_any_file_of_tasks(here, content, train, test):
    file = here / "tasks.json"
    for held in (content, {"train": train, "test": test}):
        file.write_text(json.dumps(held))
        for env in ("darkroom", "point-robot"):
            split = mended(lambda env=env: split_tasks(env, file=file))
            assert split is None or all(isinstance(task, list) for task in split[0])


def test_the_control_is_accepted(tiny_config, paper_folder, few):
    """What the tests above change is a run that works."""
    cfg = parse_config(command(tiny_config, "run", steps=5))
    one_step(replace(cfg), paper_folder)
    assert checkpoint.load_method(few, torch.device("cpu"))[1].step == 3
