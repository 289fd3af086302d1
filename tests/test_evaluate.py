"""Algorithms 2 and 4 as they are played and reported.

Returns by hand on DarkRoom with scripted policies; the files that an evaluation leaves; the same on
Point-Robot and Reach, whose states and actions are continuous; what is loaded for it.
Run: pytest tests/test_evaluate.py
"""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ROOT, flags
from matplotlib.image import imread
from tiny import rows, tensors, trainer

from collect import dataset_folder, describe_dataset
from config import Collection, Data, Play
from data import file_hash, load_dataset, part_name
from dpt import DPT
from envs import optimal_returns, random_returns
from evaluate import (
    Evaluation,
    Returns,
    ceiling,
    evaluate_run,
    in_words,
    play,
    print_table,
    summary_row,
    write_csv,
)
from support import checkpoint
from support.command_line import parse_evaluation
from support.files import save_json

RIGHT, LEFT, UP, DOWN, STAY = range(5)
SUMMARY = (
    "env,backbone,moe,routing,quality,preset,seed,steps,train_seconds,episodes,first_return,"
    "last_return,best_return,random_return,optimum,teacher_return,success,paper_return,command"
)
FIRST = {"query_position": "first", "queries": 1, "short": 0, "empty": 0}
KINDS = {"ad": ("ad", {}), "first": ("dpt", FIRST), "last": ("dpt", {})}
CPU = torch.device("cpu")


def evaluate(folder, **settings) -> dict:
    """evaluate.py of a run, with some of its flags."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    return evaluate_run(parse_evaluation(Evaluation, [str(folder), *flags(settings)]))


def policy_of(folder, **settings):
    """The run's policy, with some of its settings of play; and the run's method."""
    method, _ = checkpoint.load_method(folder, CPU)
    return method.policy(replace(method.cfg.play, **settings)), method


@pytest.fixture(scope="module")
def trained(tiny_config, paper_folder, tmp_path_factory):
    """{name: folder} of a tiny run of each layout; evaluations write elsewhere."""
    folder = tmp_path_factory.mktemp("trained")
    with trainer(tiny_config) as fit:
        return {name: fit(folder / name, kind, **more) for name, (kind, more) in KINDS.items()}


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def returns_of(results):
    """The returns (tasks, episodes) that an evaluation wrote beside its summary, and the tasks."""
    (path,) = set(results.glob("*.csv")) - {results / "summary.csv"}
    found = table(path)
    episodes = max(int(row["episode"]) for row in found)
    numbers = [int(row["episode"]) for row in found]
    assert numbers == [*range(1, episodes + 1)] * (len(found) // episodes)
    values = np.array([float(row["return"]) for row in found]).reshape(-1, episodes)
    return values, [row["task"] for row in found[::episodes]]


# ------------------------------------------------------------------------------------------ playing
class Script:
    """The same moves for all tasks, another list in each episode, then stays.

    It remembers what it is told.
    """

    memory = "last"

    def __init__(self, *scripts):
        self.scripts, self.episode, self.told, self.seen, self.rows = scripts, -1, [], [], []

    def begin(self, history, rows):
        self.episode += 1
        self.moves = iter(self.scripts[self.episode])
        self.told.append(list(history))
        self.seen.append([])
        self.rows.append(rows)

    def act(self, states):
        return torch.full((len(states),), next(self.moves, STAY))

    def observe(self, states, actions, rewards):
        self.seen[-1].append((states, actions, rewards))


def test_play_gives_the_returns_of_a_script():
    """A step pays when it ends on the goal, so two moves to a goal leave 99 of the 100 steps."""
    tasks = [[0, 0], [2, 0], [1, 1], [9, 9]]
    script = Script([RIGHT, RIGHT], [LEFT, UP, RIGHT, DOWN, RIGHT], [])
    got = play("darkroom", tasks, script, 3)
    # episode 2: (0,0) by the wall, (0,1), (1,1), (1,0), (2,0) for good; episode 3 never moves
    assert got.tolist() == [[0, 1, 100], [99, 96, 0], [0, 1, 0], [0, 0, 0]]
    assert got.shape == (4, 3) and script.rows == [4, 4, 4]


def test_every_task_is_played_from_its_own_state():
    class Walker(Script):
        def act(self, states):  # task i walks i + 1 cells to the right and stays
            return torch.where(states[:, 0] <= torch.arange(len(states)), RIGHT, STAY)

    assert play("darkroom", [[1, 0], [2, 0], [3, 0], [9, 0]], Walker([], []), 2).tolist() == [
        [100, 100],
        [99, 99],
        [98, 98],
        [0, 0],
    ]


def test_policies_are_told_all_finished_episodes_in_order():
    script = Script([RIGHT], [UP, UP], [LEFT], [])
    play("darkroom", [[1, 0], [0, 2]], script, 4)
    assert [len(history) for history in script.told] == [0, 1, 2, 3]
    for history in script.told:
        for prompt, steps in zip(history, script.seen, strict=False):
            assert prompt.states.shape == (2, 100, 2) and prompt.rewards.shape == (2, 100)
            columns = [torch.stack(column, 1) for column in zip(*steps, strict=True)]
            assert all(map(torch.equal, (prompt.states, prompt.actions, prompt.rewards), columns))
    assert [prompt.rewards.sum(1).tolist() for prompt in script.told[-1]] == [
        [100, 0],
        [0, 99],
        [0, 0],
    ]
    assert script.told[-1][1].states[0, :4].tolist() == [[0, 0], [0, 1], [0, 2], [0, 2]]


def test_random_actions_earn_their_expected_return():
    class Random(Script):
        rng = torch.Generator().manual_seed(1)

        def act(self, states):
            return torch.randint(5, (len(states),), generator=self.rng)

    tasks, count = [[0, 0], [1, 1], [3, 2]], 2000
    got = play("darkroom", tasks * count, Random([]), 1).reshape(count, 3)
    error = got.std(0) / count**0.5
    assert (np.abs(got.mean(0) - random_returns("darkroom", tasks)) < 4 * error).all()
    assert (error < 0.5).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_seed_repeats_an_evaluation_and_greedy_needs_none(trained, name):
    def played(actions, seed):
        policy, _ = policy_of(trained[name], actions=actions, play_seed=seed)
        return play("darkroom", [[1, 0], [0, 1], [0, 0], [1, 1], [2, 0]], policy, 2)

    assert (played("sample", 3) == played("sample", 3)).all()
    assert (played("sample", 3) != played("sample", 4)).any()
    assert (played("greedy", 3) == played("greedy", 4)).all()


def test_the_ceiling_is_played_as_the_policy_is(trained):
    """Drawn, the exact policy finds the corner; its arg max walks to the middle of the room."""
    policy, method = policy_of(trained["last"])
    drawn, best = (
        ceiling(method, policy, [[9, 9]], Play(episodes=12, actions=actions, temperature=4.0))
        for actions in ("sample", "greedy")
    )
    assert drawn[-1] > 20 and (best == 0).all()


# ---------------------------------------------------------------------------------------- reporting
@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_writes_what_was_played(trained, tmp_path, name, capsys):
    own = {"history": 2} if name == "ad" else {"prompt": "last"}
    row = evaluate(trained[name], episodes=3, play_seed=5, results=tmp_path, **own)
    header = checkpoint.read(trained[name])[1]
    tasks = checkpoint.read_tasks(trained[name], "darkroom").test
    want = play("darkroom", tasks, policy_of(trained[name], play_seed=5)[0], 3)
    values, named = returns_of(tmp_path)
    assert (values == want).all() and named == [f"{x} {y}" for x, y in tasks] and len(tasks) == 4
    (picture,) = tmp_path.glob("*.png")
    height, width, _ = imread(picture).shape
    assert 400 < height < width < 2000 and imread(picture).std() > 0.05
    (line,) = table(tmp_path / "summary.csv")
    assert (tmp_path / "summary.csv").read_text().splitlines()[0] == SUMMARY
    assert line == {k: str(v) for k, v in row.items()}
    curve = want.mean(0)
    assert float(line["first_return"]) == pytest.approx(curve[0], abs=0.005)
    last = curve.mean()  # of up to five episodes
    assert float(line["last_return"]) == pytest.approx(last, abs=0.005)
    assert float(line["best_return"]) == pytest.approx(curve.max(), abs=0.005)
    assert line["optimum"] == f"{np.mean([101 - 4, 101 - 14, 101 - 4, 101 - 9]):.2f}"
    floor = random_returns("darkroom", tasks).mean()
    assert float(line["random_return"]) == pytest.approx(floor, abs=0.005)
    backbone = KINDS[name][0]
    facts = [line[column] for column in ("backbone", "moe", "routing", "steps", "episodes")]
    assert facts == [backbone, "both", "prefix", "3", "3"] and header.seconds > 0
    assert line["paper_return"] == {"ad": "90.9", "dpt": "78.3"}[backbone]
    printed = capsys.readouterr().out
    for text in (str(picture), line["last_return"], line["paper_return"]):
        assert text in printed


def test_one_row_of_summary_for_each_evaluation(trained, tmp_path):
    for seed in (0, 1):
        evaluate(trained["last"], episodes=1, play_seed=seed, results=tmp_path)
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(lines) == 3 and lines.count(SUMMARY) == 1
    (tmp_path / "summary.csv").write_text("name,score\nmine,1\n")
    with pytest.raises(ValueError, match="other columns"):
        evaluate(trained["last"], episodes=1, results=tmp_path)
    assert (tmp_path / "summary.csv").read_text() == "name,score\nmine,1\n"


def test_split_repeats_and_places(trained, tmp_path):
    evaluate(trained["ad"], episodes=1, split="train", results=tmp_path / "train")
    tasks = checkpoint.read_tasks(trained["ad"], "darkroom").train
    assert returns_of(tmp_path / "train")[1] == [f"{x} {y}" for x, y in tasks] and len(tasks) == 8
    evaluate(trained["last"], episodes=1, repeats=3, results=tmp_path / "thrice")
    assert len(returns_of(tmp_path / "thrice")[0]) == 12
    before = set(trained["last"].iterdir())
    evaluate(trained["last"], episodes=1)  # beside the checkpoint, the summary beside the run
    assert {p.suffix for p in set(trained["last"].iterdir()) - before} == {".csv", ".png"}
    assert (trained["last"].parent / "summary.csv").exists()


def test_what_is_not_given_is_as_in_training(trained, tmp_path):
    """File names say how it was played."""
    evaluate(trained["ad"], results=tmp_path / "a")
    evaluate(trained["ad"], results=tmp_path / "b", actions="greedy", history=1, first="random")
    names = [next((tmp_path / folder).glob("*.png")).stem for folder in "ab"]
    assert names == ["ad-test-sample-history2", "ad-test-greedy-history1-random-first"]
    assert [len(returns_of(tmp_path / folder)[0][0]) for folder in "ab"] == [1, 1]


def test_each_evaluation_of_a_folder_has_files_of_its_own(trained, tmp_path):
    """A row of summary.csv promises them; repeats of the same play take the others' place."""
    run = trained["last"]
    for settings in ({}, {"play_seed": 1}, {"episodes": 2}, {"play_seed": 1, "episodes": 2}):
        evaluate(run, results=tmp_path, **settings)
    evaluate(run, results=tmp_path, repeats=2)
    more = ["", "-play-seed1", "-episodes2", "-play-seed1-episodes2"]
    want = {f"last-test-sample-last{name}.{kind}" for name in more for kind in ("csv", "png")}
    assert {p.name for p in tmp_path.iterdir() if p.name[0] != "."} == want | {"summary.csv"}
    assert len(table(tmp_path / "summary.csv")) == 5


def test_tasks_of_many_numbers_are_named_by_their_places(tmp_path):
    returns = Returns(np.arange(8.0).reshape(4, 2), None, None, {})
    long = [[0.5, 1.0, 1.5, 2.0], [0.25, 1.0, 1.5, 2.0]]
    for tasks, names in (
        (long, ["0", "1"]),
        ([task[:3] for task in long], ["0.5 1.0 1.5", "0.25 1.0 1.5"]),
    ):
        write_csv(tmp_path / "r.csv", tasks * 2, returns)  # each played twice
        rows = [[name, e] for name in names * 2 for e in (1, 2)]
        lines = [f"{name},{e},{value}" for (name, e), value in zip(rows, range(8), strict=True)]
        text = (tmp_path / "r.csv").read_bytes().decode()
        assert text == "\r\n".join(["task,episode,return", *lines, ""])


def test_the_last_return_is_the_mean_of_five_episodes(trained):
    run, header = checkpoint.load_config(trained["last"]), checkpoint.read(trained["last"])[1]
    lines = dict.fromkeys(("random", "optimum", "teacher", "paper"))
    success = np.arange(8)[None] >= 6
    returns = Returns(np.arange(8.0)[None], success, None, lines)
    row = summary_row(run, header, Evaluation("", play=run.play), returns)
    assert (row["first_return"], row["last_return"], row["best_return"]) == ("0.00", "5.00", "7.00")
    assert row["success"] == "0.40"


@pytest.mark.parametrize("first", ["policy", "random"])
def test_in_words(first):
    """What a curve began with, and what it is to be compared with."""
    method = SimpleNamespace(label="T2MIR-AD", try_next="more")
    cfg = Evaluation("", play=Play(first=first))
    hot = Evaluation("", play=Play(first=first, temperature=4.0))
    best = Evaluation("", play=Play(first=first, temperature=4.0, actions="greedy"))
    facts = {"first_return": "1.00", "last_return": "5.00", "optimum": "", "teacher_return": ""}
    began = "its first episode" if first == "policy" else "a first episode of random actions"

    def words(memory="all", ceiling=None, cfg=cfg, **known):
        policy = SimpleNamespace(memory=memory)
        returns = Returns(np.zeros((1, 8)), None, ceiling, {})
        learnt, best = in_words(method, policy, cfg, facts | known, returns).split("\n")
        assert f"T2MIR-AD went from a return of 1.00 in {began} to 5.00 in its last ones" in learnt
        assert best.endswith(". To try next: more.")
        return best.removesuffix(". To try next: more.")

    perfect = "The ceiling here is 5.00, of a perfect policy that reads"
    known = {"optimum": "9.00", "teacher_return": "8.00"}
    assert words("all", np.arange(8.0), **known) == f"{perfect} every episode"
    assert words("last", np.arange(8.0), **known) == f"{perfect} the last episode"
    hotter = f"{perfect} the last episode and draws at the same temperature"
    assert words("last", np.arange(8.0), hot, **known) == hotter
    likeliest = f"{perfect} the last episode and takes the likeliest action"
    assert words("last", np.arange(8.0), best, **known) == likeliest
    assert words(**known) == "The ceiling here is 9.00, the optimum"
    assert words(teacher_return="8.00") == "The teachers reach 8.00"
    assert words() == "The ceiling here is not known"


# ------------------------------------------------------------------------------ continuous families
@pytest.fixture(scope="module")
def robots(point_config, point_folder, tmp_path_factory):
    """{name: folder} of a tiny run of each layout on Point-Robot."""
    folder = tmp_path_factory.mktemp("robots")
    with trainer(point_config) as fit:
        return {name: fit(folder / name, kind, **more) for name, (kind, more) in KINDS.items()}


class Constant(Script):
    """Row i acts `actions[i]` at every step of every episode."""

    def __init__(self, actions):
        super().__init__([], [], [], [])
        self.actions = torch.tensor(actions)

    def act(self, states):
        return self.actions[: len(states)]


def test_returns_of_point_robot_by_hand():
    """Starts differ between tasks, episodes and seeds; a full action moves by 0.1."""
    script = Constant([[0.0, 0.0], [1.0, 0.0]])
    got = play("point-robot", [[0.5, 0.0], [0.5, 0.0]], script, 2, seed=3)
    for e in range(2):
        starts = script.seen[e][0][0].double()
        still = -20 * (starts[0] - torch.tensor([0.5, 0.0])).norm()
        moved = starts[1] + torch.stack([0.1 * torch.arange(1, 21), torch.zeros(20)], 1)
        want = [still, -(moved - torch.tensor([0.5, 0.0])).norm(dim=1).sum()]
        assert got[:, e] == pytest.approx(torch.stack(want).numpy(), rel=1e-5)
    starts = torch.cat([episode[0][0] for episode in script.seen[:2]])
    assert len(starts.unique(dim=0)) == 4 and starts.abs().max() <= 0.1
    still = [
        play("point-robot", [[0.5, 0.0]] * 2, Constant([[0.0, 0.0]] * 2), 2, seed)
        for seed in (3, 4)
    ]
    assert (still[0][0] == got[0]).all() and (still[1][0] != got[0]).all()


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_of_point_robot(robots, point_folder, tmp_path, name, capsys):
    row = evaluate(robots[name], episodes=3, play_seed=5, results=tmp_path)
    data = load_dataset(point_folder)
    tasks = data.meta["test_tasks"]
    policy, method = policy_of(robots[name])
    assert torch.equal(method.state_mean, data.state_mean)
    assert torch.equal(method.state_std, data.state_std)
    want = play("point-robot", tasks, policy, 3, seed=5)
    method.state_mean, method.state_std = torch.zeros(2), torch.ones(2)
    plain = play("point-robot", tasks, method.policy(method.cfg.play), 3, seed=5)
    values, named = returns_of(tmp_path)
    assert values == pytest.approx(want, rel=1e-5) and (values != pytest.approx(plain, rel=1e-5))
    assert named == [f"{x} {y}" for x, y in tasks] and len(tasks) == 2
    (line,) = table(tmp_path / "summary.csv")
    assert line == {k: str(v) for k, v in row.items()}
    known = data.meta["reference"]["test"]
    assert line["teacher_return"] == f"{np.mean(known['teacher']):.2f}"
    assert line["random_return"] == f"{np.mean(known['random']):.2f}"
    assert line["optimum"] == f"{optimal_returns('point-robot', tasks).mean():.2f}"
    facts = [line[column] for column in ("env", "success", "paper_return")]
    assert facts == ["point-robot", "", str({"ad": -5.2}.get(name, -5.0))]
    last, floor, best = (float(line[k]) for k in ("last_return", "random_return", "optimum"))
    printed = capsys.readouterr().out
    assert f"{'random 0, optimum 1: last 3':<32}{(last - floor) / (best - floor):>8.3f}" in printed
    assert "success" not in printed and str(next(tmp_path.glob("*.png"))) in printed
    finite = [row[k] for row in rows(robots[name]) for k in ("loss", "imitation", "grad_norm")]
    assert len(finite) == 9 and all(math.isfinite(float(value)) for value in finite)
    assert torch.equal(tensors(robots[name])["states.mean"], data.state_mean)


def test_the_training_split_has_references_of_its_own(robots, point_folder, tmp_path):
    row = evaluate(robots["last"], episodes=1, split="train", results=tmp_path)
    known = load_dataset(point_folder).meta["reference"]["train"]
    assert row["teacher_return"] == f"{np.mean(known['teacher']):.2f}"
    assert row["random_return"] == f"{np.mean(known['random']):.2f}" and len(known["random"]) == 5


@pytest.fixture(scope="module")
def reacher(tmp_path_factory):
    """A run of one step on a dataset of Reach that holds random numbers."""
    data = Data(env="reach", train_tasks=2, test_tasks=2, data_episodes=5, data_queries=10,
                datasets=str(tmp_path_factory.mktemp("reach")))  # fmt: skip
    cfg, rng, hashes = Collection(data), np.random.default_rng(0), []
    folder = dataset_folder(cfg)
    folder.mkdir()
    shapes = {"states": (5, 100, 18), "actions": (5, 100, 4), "rewards": (5, 100)}
    shapes |= {"query_states": (10, 18), "query_actions": (10, 4)}
    for i in range(2):
        arrays = {k: rng.uniform(-1, 1, shape).astype(np.float32) for k, shape in shapes.items()}
        np.savez_compressed(folder / part_name(i), **arrays)
        hashes.append(file_hash(folder / part_name(i)))
    known = {"random": [10.0, 20.0], "teacher": [300.0, 500.0], "highest": [301.0, 501.0]}
    meta = describe_dataset(cfg) | {"reference": {"test": known}, "sha256": hashes}
    save_json(folder / "meta.json", meta)
    with trainer(cfg) as fit:
        return fit(tmp_path_factory.mktemp("reacher") / "run", steps=1)


class Hand(Script):
    """In its second episode the first task's hand goes to the goal; the others stay."""

    def __init__(self, goal):
        super().__init__([], [])
        # what is observed is above the fingers
        self.goal = torch.tensor([*goal[:2], goal[2] + 0.045])

    def act(self, states):
        actions = torch.zeros(len(states), 4)
        if self.episode == 1:
            actions[0, :3] = (10 * (self.goal - states[0, :3])).clamp(-1, 1)
        return actions


def test_success_of_reach_is_played_and_reported(reacher, tmp_path, monkeypatch, capsys):
    tasks = checkpoint.read_tasks(reacher, "reach").test
    monkeypatch.setattr(DPT, "policy", lambda *_: Hand(tasks[0]))
    row = evaluate(reacher, episodes=2, results=tmp_path)
    (path,) = set(tmp_path.glob("*.csv")) - {tmp_path / "summary.csv"}
    found = table(path)
    successes = [(line["episode"], line["success"]) for line in found]
    assert successes == [("1", "0"), ("2", "1"), ("1", "0"), ("2", "0")]
    returns = [float(line["return"]) for line in found]
    assert returns[1] > 2 * returns[0] and returns[3] == pytest.approx(returns[2], rel=1e-4)
    references = (row["success"], row["teacher_return"], row["random_return"])
    assert references == ("0.25", "400.00", "15.00")
    assert row["optimum"] == "" and table(tmp_path / "summary.csv")[0]["success"] == "0.25"
    printed = capsys.readouterr().out
    share = (float(row["last_return"]) - 15) / (400 - 15)
    assert f"{'random 0, teacher 1: last 2':<32}{share:>8.3f}" in printed
    assert f"{'success, last 2':<32}    25 %" in printed
    assert float(row["last_return"]) == pytest.approx(np.mean(returns), abs=0.01)


def test_a_table_without_a_share(capsys):
    """No share where the teacher is no better than random."""
    row = {f"{name}_return": "5.00" for name in ("first", "last", "best", "random", "teacher")}
    row |= {"optimum": "", "success": "", "paper_return": ""}
    returns = Returns(np.array([[5.0]]), None, None, {})
    print_table(row, returns)
    assert "random 0" not in capsys.readouterr().out
    print_table(row | {"teacher_return": "9.00"}, returns)
    assert "random 0, teacher 1: last 1" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- what is loaded
def test_an_evaluation_loads_no_simulator_and_no_teacher(trained, robots, tmp_path):
    """A checkpoint of DarkRoom or Point-Robot plays where only torch and numpy's kin are."""
    code = f"""
import runpy, sys
for run in {[str(trained["last"]), str(robots["ad"])]}:
    sys.argv = ["evaluate.py", run, "--episodes", "1", "--results", {str(tmp_path)!r}]
    runpy.run_path({str(ROOT / "evaluate.py")!r}, run_name="__main__")
print("LOADED", *sys.modules)
"""
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.partition("LOADED")[2].split()}
    heavy = {"stable_baselines3", "mujoco", "metaworld", "collect", "teachers", "tensorboard"}
    assert "matplotlib" in loaded and not loaded & heavy
    assert len(list(tmp_path.glob("*.png"))) == 2
