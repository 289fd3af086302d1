"""test_evaluate.py: Algorithms 2 and 4 as they are played and reported, and what diagnostics.py measures (Sec. 5.4).

Returns by hand on DarkRoom with scripted policies; the files that an evaluation leaves; what a model is shown; the same
on Point-Robot and Reach, whose states and actions are continuous.
Run: python -m pytest -q tests/test_evaluate.py
"""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy.stats import norm
from tiny import command, rows, tensors, trainer

import evaluate
from collect import CollectConfig, dataset_folder, settings_of
from config import parse
from data import FORMAT, ADBatch, DPTBatch, Prompt, file_hash, load_dataset, part_name
from diagnostics import least_share, modality_counts, mutual_information, probe
from envs import random_returns
from evaluate import Settings, evaluate_run, interval, play, print_table
from families.rooms import point_robot_optimum
from models import T2MIR
from policies import RandomPolicy, check_noise, concatenate, make_policy, sort_and_drop
from support import checkpoint

RIGHT, LEFT, UP, DOWN, STAY = range(5)
SUMMARY = (
    "env,backbone,moe,routing,quality,preset,seed,steps,train_seconds,episodes,first_return,last_return,best_return,"
    "random_return,optimum,teacher_return,success,paper_return,command"
)
KINDS = {"ad": ("ad", {}), "first": ("dpt", {"query_position": "first", "queries": 1, "short": 0, "empty": 0}),
         "last": ("dpt", {})}  # fmt: skip


def settings(actions="sample", prompt="last", history=2, first="policy", noise=0.0):
    return Settings(actions, prompt, history, first, noise)


@pytest.fixture(scope="module")
def trained(tiny_config, paper_folder, tmp_path_factory):
    """{name: folder} of a tiny run of each layout; evaluations write elsewhere."""
    folder = tmp_path_factory.mktemp("trained")
    with trainer(tiny_config) as fit:
        return {
            name: fit(folder / name, backbone, **more) for name, (backbone, more) in KINDS.items()
        }


@pytest.fixture
def build(tiny_config):
    """build(layout): an untrained tiny model."""

    def make(name, **changes):
        backbone, more = KINDS[name]
        torch.manual_seed(0)
        return T2MIR(parse(command(tiny_config, None, backbone, **more | changes)).model()).eval()

    return make


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def returns_of(results):
    """The returns (tasks, episodes) that an evaluation wrote beside its summary, and the tasks."""
    (path,) = set(results.glob("*.csv")) - {results / "summary.csv"}
    found = table(path)
    episodes = max(int(row["episode"]) for row in found)
    assert [int(row["episode"]) for row in found] == [*range(1, episodes + 1)] * (
        len(found) // episodes
    )
    values = np.array([float(row["return"]) for row in found]).reshape(-1, episodes)
    return values, [row["task"] for row in found[::episodes]]


# -------------------------------------------------------------------------------------------- playing
class Script:
    """The same moves for all tasks, another list in each episode, then stays; remembers what it is told."""

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


def test_the_random_policy_earns_its_expected_return():
    tasks, many = [[0, 0], [1, 1], [3, 2]], 2000
    got = play("darkroom", tasks * many, RandomPolicy(5, seed=1), 1).reshape(many, 3)
    error = got.std(0) / many**0.5
    assert (np.abs(got.mean(0) - random_returns("darkroom", tasks)) < 4 * error).all() and (
        error < 0.5
    ).all()


def watch(monkeypatch, lengths):
    """Collect into `lengths` how many tokens a model reads for each prediction, a DPT's query left out."""
    feed, forward = T2MIR.feed, T2MIR.forward

    def fed(self, tokens, cache, keep=True):
        if self.cfg.backbone == "ad":
            lengths.append(cache.length + tokens.shape[1])
        elif not keep:  # the query
            lengths.append(cache.length)
        return feed(self, tokens, cache, keep)

    def forwarded(self, batch):
        lengths.append(3 * batch.prompt.steps)
        return forward(self, batch)

    monkeypatch.setattr(T2MIR, "feed", fed)
    monkeypatch.setattr(T2MIR, "forward", forwarded)


@pytest.mark.parametrize("name", ["first", "last"])
@pytest.mark.parametrize(
    ("memory", "want"), [("last", [0, 300, 300, 300]), ("all", [0, 300, 600, 900])]
)
def test_dpt_is_given_the_last_episode_or_all(build, monkeypatch, name, memory, want):
    """Algorithm 4: the prompt of each episode, which does not grow while it is played."""
    lengths, policy = [], make_policy(build(name), settings(prompt=memory))
    watch(monkeypatch, lengths)
    seen, begin = [], policy.begin

    def began(history, rows):
        seen.append(set(lengths))
        lengths.clear()
        begin(history, rows)

    monkeypatch.setattr(policy, "begin", began)
    play("darkroom", [[2, 2], [8, 6]], policy, 4)
    assert [*seen[1:], set(lengths)] == [{length} for length in want]


@pytest.mark.parametrize("routing", ["prefix", "sequence"])
def test_ad_keeps_the_best_episodes_of_its_history(build, monkeypatch, routing):
    """Algorithm 2 with K = 2: nothing, one and two episodes before the running one, and never a third."""
    lengths, policy = [], make_policy(build("ad", routing=routing), settings())
    watch(monkeypatch, lengths)
    returns = play("darkroom", [[0, 1], [1, 0], [1, 1]], policy, 5)
    assert max(lengths) == 3 * 100 * 3 - 2  # two episodes, and 99 steps with the last state
    ends = [length for length in lengths if length % 300 == 298]
    assert ends == [298, 598, 898, 898, 898]
    policy.begin([], 3)
    past = [SimpleNamespace(states=torch.zeros(3, 100, 2).long(), actions=torch.zeros(3, 100).long(),
                            rewards=torch.full((3, 100), r)) for r in (0.5, 0.2, 0.1, 0.3)]  # fmt: skip
    kept = []
    for i in range(4):
        policy.begin(past[: i + 1], 3)
        kept.append([round(p.rewards[0, 0].item(), 1) for p in policy.kept])
    assert kept == [[0.5], [0.2, 0.5], [0.2, 0.5], [0.3, 0.5]] and returns.shape == (3, 5)


@pytest.mark.parametrize("name", KINDS)
def test_a_seed_repeats_an_evaluation_and_greedy_needs_none(trained, name):
    def played(actions, seed):
        model, cfg, _, states = checkpoint.load_model(trained[name], "cpu")
        policy = make_policy(model, settings(actions), seed, *states)
        return play(cfg.env, [[1, 0], [0, 1], [0, 0], [1, 1], [2, 0]], policy, 2)

    assert (played("sample", 3) == played("sample", 3)).all()
    assert (played("sample", 3) != played("sample", 4)).any()
    assert (played("greedy", 3) == played("greedy", 4)).all()


# ------------------------------------------------------------------------------------------ reporting
def test_interval():
    values = np.random.default_rng(0).normal(size=(200, 3)) * [1, 5, 0] + [0, 10, 7]
    low, high = interval(values)
    assert (low <= values.mean(0)).all() and (values.mean(0) <= high).all()
    width = 2 * norm.ppf(0.975) * values.std(0, ddof=1) / 200**0.5  # of the normal approximation
    assert high - low == pytest.approx(width, rel=0.1, abs=1e-12)
    assert (low[2], high[2]) == pytest.approx((7, 7))
    assert all((a == b).all() for a, b in zip(interval(values), (low, high), strict=True))
    one = np.array([[3.0, 4.0]])
    assert all(side.tolist() == [3, 4] for side in interval(one))


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_writes_what_was_played(trained, tmp_path, name, capsys):
    row = evaluate_run(trained[name], episodes=3, history=2, seed=5, results=str(tmp_path))
    model, cfg, about, states = checkpoint.load_model(trained[name], "cpu")
    tasks = checkpoint.read_tasks(trained[name])["test"]
    want = play(cfg.env, tasks, make_policy(model, settings(), 5, *states), 3)
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
    assert float(line["last_return"]) == pytest.approx(
        curve.mean(), abs=0.005
    )  # of up to five episodes
    assert float(line["best_return"]) == pytest.approx(curve.max(), abs=0.005)
    assert line["optimum"] == f"{np.mean([101 - 4, 101 - 14, 101 - 4, 101 - 9]):.2f}"
    assert float(line["random_return"]) == pytest.approx(
        random_returns("darkroom", tasks).mean(), abs=0.005
    )
    assert (line["backbone"], line["moe"], line["steps"], line["episodes"]) == (
        cfg.backbone,
        "both",
        "3",
        "3",
    )
    assert (
        line["paper_return"] == {"ad": "90.9", "dpt": "78.3"}[cfg.backbone]
        and float(about["seconds"]) > 0
    )
    printed = capsys.readouterr().out
    assert (
        str(picture) in printed
        and line["last_return"] in printed
        and line["paper_return"] in printed
    )


def test_one_row_of_summary_for_each_evaluation(trained, tmp_path):
    for seed in (0, 1):
        evaluate_run(trained["last"], episodes=1, seed=seed, results=str(tmp_path))
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(lines) == 3 and lines.count(SUMMARY) == 1
    (tmp_path / "summary.csv").write_text("name,score\nmine,1\n")
    with pytest.raises(ValueError, match="other columns"):
        evaluate_run(trained["last"], episodes=1, results=str(tmp_path))
    assert (tmp_path / "summary.csv").read_text() == "name,score\nmine,1\n"


def test_split_repeats_and_places(trained, tmp_path):
    evaluate_run(trained["ad"], episodes=1, split="train", results=str(tmp_path / "train"))
    tasks = [f"{x} {y}" for x, y in checkpoint.read_tasks(trained["ad"])["train"]]
    assert returns_of(tmp_path / "train")[1] == tasks and len(tasks) == 8
    evaluate_run(trained["last"], episodes=1, repeats=3, results=str(tmp_path / "thrice"))
    assert len(returns_of(tmp_path / "thrice")[0]) == 12
    before = set(trained["last"].iterdir())
    evaluate_run(
        trained["last"], episodes=1
    )  # by default beside the checkpoint, the summary beside the run
    assert {p.suffix for p in set(trained["last"].iterdir()) - before} == {".csv", ".png"}
    assert (trained["last"].parent / "summary.csv").exists()


# ------------------------------------------------------------------------------ continuous families
MEAN, STD = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0])
GOALS = [[0.5, -0.5], [-1.0, 0.2], [0.05, 0.9]]


@pytest.fixture(scope="module")
def robots(point_config, point_folder, tmp_path_factory):
    """{name: folder} of a tiny run of each layout on Point-Robot."""
    folder = tmp_path_factory.mktemp("robots")
    with trainer(point_config) as fit:
        return {
            name: fit(folder / name, backbone, **more) for name, (backbone, more) in KINDS.items()
        }


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
    assert (
        play("point-robot", [[0.5, 0.0]] * 2, Constant([[0.0, 0.0]] * 2), 2, seed=3)[0] == got[0]
    ).all()
    assert (
        play("point-robot", [[0.5, 0.0]] * 2, Constant([[0.0, 0.0]] * 2), 2, seed=4)[0] != got[0]
    ).all()


def played(model, settings, episodes=4):
    """What a policy that normalises by MEAN and STD played on Point-Robot: a Prompt for each episode."""
    policy, seen = make_policy(model, settings, 0, MEAN, STD), []
    begin = policy.begin
    policy.begin = lambda history, rows: (seen.append(history), begin(history, rows))[1]
    play("point-robot", GOALS, policy, episodes)
    return seen[0]  # the list that grows


def model_of(point_config, name, **changes):
    """A tiny model with random weights, also where they start at zero."""
    backbone, more = KINDS[name]
    torch.manual_seed(0)
    model = T2MIR(parse(command(point_config, None, backbone, **more | changes)).model()).eval()
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def shown(prompt):
    """A prompt as a model reads it."""
    return Prompt((prompt.states - MEAN) / STD, prompt.actions, prompt.rewards)


def check_actions(episodes, want, first):
    for e, episode in enumerate(episodes):
        if e or first == "policy":
            torch.testing.assert_close(episode.actions, want[e], atol=1e-5, rtol=0)
        else:  # random ones
            assert (
                episode.actions - want[e]
            ).abs().mean() > 0.1 and episode.actions.abs().max() <= 1
            assert episode.actions.abs().mean() == pytest.approx(0.5, abs=0.13)
            assert episode.actions.mean() == pytest.approx(0, abs=0.26)
    later = torch.cat([episode.actions for episode in episodes[1:]], 1)
    assert later.abs().max() <= 1 and (later.std(1) > 1e-3).all()  # they differ from step to step


@pytest.mark.parametrize("first", ["policy", "random"])
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_algorithm2_with_continuous_numbers(point_config, monkeypatch, cached, first):
    """Step by step with a cache, or the whole context each time: the actions of one pass over each episode."""
    model = model_of(point_config, "ad")
    with monkeypatch.context() as patch:
        if not cached:
            patch.setattr(type(model.cfg), "cacheable", property(lambda self: False))
            patch.setattr(T2MIR, "feed", None)
        episodes = played(model, settings(first=first))
    kept, want = [], []
    for episode in episodes:
        want.append(
            model(ADBatch(shown(concatenate([*kept, episode])), torch.arange(3))).action[:, -20:]
        )
        kept = sort_and_drop([*kept, episode], 2)
    check_actions(episodes, want, first)


@pytest.mark.parametrize("backbone", ["ad", "last"])
@torch.no_grad()
def test_noise_has_its_deviation_around_the_mean_action(point_config, backbone):
    """The network reads the actions that were played, noise included."""
    model = model_of(point_config, backbone)
    episodes = played(model, settings(noise=0.25))
    again = played(model, settings(noise=0.25))
    assert all(torch.equal(a.actions, b.actions) for a, b in zip(episodes, again, strict=True))
    if backbone == "ad":
        mean = model(ADBatch(shown(episodes[0]), torch.arange(3))).action
    else:
        past, sees = (
            Prompt(torch.zeros(3, 0, 2), torch.zeros(3, 0, 2), torch.zeros(3, 0)),
            torch.zeros(3, 1).long(),
        )
        queries = shown(episodes[0]).states.split(1, 1)
        mean = torch.cat(
            [model(DPTBatch(past, None, query, None, sees)).action for query in queries], 1
        )
    noise, inside = episodes[0].actions - mean, episodes[0].actions.abs() < 1
    assert episodes[0].actions.abs().max() <= 1 and inside.float().mean() > 0.5
    inner = noise[mean.abs() < 0.25]  # three deviations from the nearest wall
    assert len(inner) > 10 and inner.std().item() == pytest.approx(
        0.25, rel=4 / (2 * len(inner)) ** 0.5
    )
    assert abs(inner.mean().item()) < 4 * 0.25 / len(inner) ** 0.5


@pytest.mark.parametrize(
    "noise, named",
    [(-0.1, "at least 0"), (float("nan"), "at least 0"), (0.1, "continuous actions")],
)
def test_impossible_noise_is_refused(noise, named):
    with pytest.raises(ValueError, match=named) as error:
        check_noise(noise, "darkroom")
    assert "\n" not in str(error.value)
    check_noise(0.1, "point-robot")
    check_noise(0.0, "darkroom")


@pytest.mark.parametrize("first", ["policy", "random"])
@pytest.mark.parametrize("memory", ["last", "all"])
@pytest.mark.parametrize("name", ["first", "last"])
@torch.no_grad()
def test_algorithm4_with_continuous_numbers(point_config, name, memory, first):
    model = model_of(point_config, name)
    episodes, want = played(model, settings(prompt=memory, first=first)), []
    for e, episode in enumerate(episodes):
        past = concatenate(episodes[e - 1 : e] if memory == "last" else episodes[:e]) if e else None
        past = past or Prompt(torch.zeros(3, 0, 2), torch.zeros(3, 0, 2), torch.zeros(3, 0))
        sees = torch.full((3, 1), past.steps)
        queries = ((episode.states - MEAN) / STD).split(1, 1)
        predicted = [
            model(DPTBatch(shown(past), None, query, None, sees)).action[:, -1] for query in queries
        ]
        want.append(torch.stack(predicted, 1))
    check_actions(episodes, want, first)


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_of_point_robot(robots, point_folder, tmp_path, name, capsys):
    row = evaluate_run(robots[name], episodes=3, seed=5, history=2, results=str(tmp_path))
    data = load_dataset(point_folder)
    model, _, _, states = checkpoint.load_model(robots[name], "cpu")
    assert torch.equal(states[0], data.state_mean) and torch.equal(states[1], data.state_std)
    tasks = data.meta["test_tasks"]
    want, plain = (
        play("point-robot", tasks, make_policy(model, settings(), 5, *read), 3, seed=5)
        for read in (states, ())
    )
    values, named = returns_of(tmp_path)
    assert values == pytest.approx(want, rel=1e-5) and (values != pytest.approx(plain, rel=1e-5))
    assert named == [f"{x} {y}" for x, y in tasks] and len(tasks) == 2
    (line,) = table(tmp_path / "summary.csv")
    assert line == {k: str(v) for k, v in row.items()}
    known = data.meta["reference"]["test"]
    assert line["teacher_return"] == f"{np.mean(known['expert']):.2f}"
    assert line["random_return"] == f"{np.mean(known['random']):.2f}"
    assert line["optimum"] == f"{point_robot_optimum(tasks).mean():.2f}"
    assert (line["env"], line["success"], line["paper_return"]) == (
        "point-robot",
        "",
        str({"ad": -5.2}.get(name, -5.0)),
    )
    last, floor, best = (float(line[k]) for k in ("last_return", "random_return", "optimum"))
    printed = capsys.readouterr().out
    assert f"{'random 0, optimum 1: last 3':<32}{(last - floor) / (best - floor):>8.3f}" in printed
    assert "success" not in printed and str(next(tmp_path.glob("*.png"))) in printed
    finite = [row[k] for row in rows(robots[name]) for k in ("loss", "imitation", "grad_norm")]
    assert len(finite) == 9 and all(math.isfinite(float(value)) for value in finite)
    assert torch.equal(tensors(robots[name])["states.mean"], data.state_mean)


def test_the_training_split_has_references_of_its_own(robots, point_folder, tmp_path):
    row = evaluate_run(robots["last"], episodes=1, split="train", results=str(tmp_path))
    known = load_dataset(point_folder).meta["reference"]["train"]
    assert row["teacher_return"] == f"{np.mean(known['expert']):.2f}"
    assert row["random_return"] == f"{np.mean(known['random']):.2f}" and len(known["random"]) == 5


@pytest.fixture(scope="module")
def reacher(tmp_path_factory):
    """A run of one step on a dataset of Reach that holds random numbers."""
    cfg = CollectConfig(env="reach", train_tasks=2, test_tasks=2, episodes=5, queries=10,
                        folder=str(tmp_path_factory.mktemp("reach")))  # fmt: skip
    folder, (train, test), rng, hashes = (
        dataset_folder(cfg),
        cfg.split(),
        np.random.default_rng(0),
        [],
    )
    folder.mkdir()
    shapes = {"states": (5, 100, 18), "actions": (5, 100, 4), "rewards": (5, 100)}
    shapes |= {"query_states": (10, 18), "query_actions": (10, 4)}
    for i in range(2):
        path = folder / part_name(i)
        np.savez_compressed(
            path, **{k: rng.uniform(-1, 1, shape).astype(np.float32) for k, shape in shapes.items()}
        )
        hashes.append(file_hash(path))
    reference = {
        "test": {"random": [10.0, 20.0], "teacher": [300.0, 500.0], "highest": [301.0, 501.0]}
    }
    meta = {
        "format": FORMAT,
        **settings_of(cfg),
        "horizon": 100,
        "train_tasks": train,
        "test_tasks": test,
    }
    (folder / "meta.json").write_text(json.dumps(meta | {"reference": reference, "sha256": hashes}))
    with trainer(cfg) as fit:
        return fit(tmp_path_factory.mktemp("reacher") / "run", steps=1)


class Hand(Script):
    """In its second episode the first task's hand goes to the goal; the others stay where they are."""

    def __init__(self, goal):
        super().__init__([], [])
        self.goal = torch.tensor(
            [*goal[:2], goal[2] + 0.045]
        )  # what is observed is above the fingers

    def act(self, states):
        actions = torch.zeros(len(states), 4)
        if self.episode == 1:
            actions[0, :3] = (10 * (self.goal - states[0, :3])).clamp(-1, 1)
        return actions


def test_success_of_reach_is_played_and_reported(reacher, tmp_path, monkeypatch, capsys):
    tasks = checkpoint.read_tasks(reacher)["test"]
    monkeypatch.setattr(evaluate, "make_policy", lambda *_: Hand(tasks[0]))
    row = evaluate_run(reacher, episodes=2, results=str(tmp_path))
    (path,) = set(tmp_path.glob("*.csv")) - {tmp_path / "summary.csv"}
    found = table(path)
    assert [(line["episode"], line["success"]) for line in found] == [
        ("1", "0"),
        ("2", "1"),
        ("1", "0"),
        ("2", "0"),
    ]
    returns = [float(line["return"]) for line in found]
    assert returns[1] > 2 * returns[0] and returns[3] == pytest.approx(returns[2], rel=1e-4)
    assert (row["success"], row["teacher_return"], row["random_return"]) == (
        "0.25",
        "400.00",
        "15.00",
    )
    assert row["optimum"] == "" and table(tmp_path / "summary.csv")[0]["success"] == "0.25"
    printed = capsys.readouterr().out
    share = (float(row["last_return"]) - 15) / (400 - 15)
    assert (
        f"{'random 0, expert 1: last 2':<32}{share:>8.3f}" in printed
        and f"{'success, last 2':<32}    25 %" in printed
    )
    assert float(row["last_return"]) == pytest.approx(np.mean(returns), abs=0.01)


def test_a_table_without_a_share(capsys):
    """No share where the expert is no better than random."""
    row = {f"{name}_return": "5.00" for name in ("first", "last", "best", "random", "teacher")}
    row |= {"optimum": "", "success": "", "paper_return": ""}
    print_table(row, np.array([5.0]), None, 1)
    assert "random 0" not in capsys.readouterr().out
    print_table(row | {"teacher_return": "9.00"}, np.array([5.0]), None, 1)
    assert "random 0, expert 1: last 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- diagnostics
@pytest.mark.parametrize(
    ("joint", "bits"),
    [
        ([[1, 2], [2, 4]], 0.0),  # independent
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], math.log2(3)),  # one tells the other
        (
            [[1, 1], [0, 2]],
            1 + 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3) - 1.5,
        ),  # H(X) + H(Y) - H(X, Y)
        ([[3, 0], [0, 0]], 0.0),  # nothing varies
    ],
)
def test_mutual_information(joint, bits):
    assert mutual_information(torch.tensor(joint)) == pytest.approx(bits, abs=1e-6)


def test_least_share():
    kept = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 1]])  # 3, 3 and 2 choices of 8
    assert least_share(kept, 3) == pytest.approx(2 / 8) and least_share(kept, 4) == 0


def test_modality_counts_take_the_best_expert_and_leave_queries_out():
    token_expert = torch.tensor(
        [[[0, 1], [1, 3], [2, 3], [0, 1], [3, 0]], [[0, 2], [1, 0], [1, 2], [3, 2], [3, 1]]]
    )
    out = SimpleNamespace(token_expert=token_expert, modality=torch.tensor([0, 1, 2, 0, 3]))
    assert modality_counts(out, 4).tolist() == [[3, 0, 0, 1], [0, 2, 0, 0], [0, 1, 1, 0]]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("moe", ["both", "none"])
def test_probe_looks_without_changing_anything(tiny_config, explore_data, build, name, moe):
    backbone, more = KINDS[name]
    model, cfg = build(name, moe=moe), parse(command(tiny_config, None, backbone, moe=moe, **more))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        found = probe(model, explore_data, cfg, 1, "cpu")
        assert model.training is training and all(
            module.training is training for module in model.modules()
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    want = {
        "token_mi",
        "token_least",
        "task_least",
        "contrastive_fresh",
        "accuracy_fresh",
        "chance",
    }
    want = (want if moe == "both" else set()) | (
        {"kl_reward", "kl_no_reward"} if backbone == "dpt" else set()
    )
    assert set(found) == want and all(math.isfinite(value) for value in found.values())
    if moe == "both":
        assert 0 <= found["token_mi"] <= math.log2(3) and 0 <= found["token_least"] <= 1 / 4
        assert (
            found["chance"] == 1 / 15 and 0 <= found["accuracy_fresh"] <= 1
        )  # two draws of each of eight tasks
    if want:
        assert (
            probe(model, explore_data, cfg, 1, "cpu")
            == found
            != probe(model, explore_data, cfg, 2, "cpu")
        )
