"""A family of the user's with discrete actions, taught by PPO (the paper has none: rollouts.py).

A small grid whose states are cells or, by the same rules, continuous places.
Run: pytest tests/test_discrete_teachers.py
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, at_home, changed
from stable_baselines3.common.preprocessing import preprocess_obs

from collect import collect
from config import Collection, Data, Teachers, Work
from data import load_dataset
from envs import get_family, make_env
from teachers.ppo import PPOConfig, network_input
from teachers.rollouts import Policies, load_policies, rollout
from teachers.stored import WEIGHTS
from teachers.teachers import algorithm, checkpoints

SIDE, HORIZON = 4, 8
MOVES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
RULES = """
import numpy as np

from envs import Family

SIDE, HORIZON = 4, 8
MOVES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])


class Batch:
    success = None

    def __init__(self, tasks, seed=0):
        self.goals, self.rng = np.asarray(tasks, int), np.random.default_rng(seed)

    def observe(self):
        return self.cells.copy() if STATES else self.cells.astype(np.float32) / SIDE

    def reset(self):
        self.cells = np.zeros_like(self.goals)
        return self.observe()

    def step(self, actions):
        assert actions.shape == (len(self.goals),) and actions.dtype.kind in "iu"
        self.cells = np.clip(self.cells + MOVES[actions], 0, SIDE - 1)
        return self.observe(), (self.cells == self.goals).all(-1).astype(np.float32)


def sample_tasks(count, rng):
    cells = np.stack(np.divmod(np.arange(SIDE**2), SIDE), 1)
    return rng.permutation(cells[cells.sum(1) > 1])[:count]  # not beside the start
"""
FAMILY = """

GRID = Family(
    name="grid",
    horizon=HORIZON,
    state_dim=2,
    state_values=STATES,
    action_dim=4,
    discrete_actions=True,
    train_tasks=3,
    test_tasks=2,
    task_low=(0, 0),
    task_high=(SIDE - 1, SIDE - 1),
    batch=Batch,
    sample_tasks=sample_tasks,
    teacher=TEACHER,
)
"""


def write(folder, states=None, teacher="ppo") -> str:
    """The file of a grid."""
    file = folder / f"grid{len(states or ())}.py"
    file.write_text(f"STATES, TEACHER = {states}, {teacher!r}\n{RULES}{FAMILY}")
    return str(file)


@pytest.fixture(scope="module", params=[(SIDE, SIDE), None], ids=["cells", "places"])
def collected(request, tmp_path_factory):
    """(settings, folder) of a dataset of three tasks; teachers' settings are mostly defaults."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("grid")
    env = write(folder, request.param)
    data = Data(env=env, data_episodes=20, data_queries=60, datasets=str(folder / "datasets"))
    # 300 episodes: with some seeds a far goal is never met by chance, and nothing is learnt there
    teachers = Teachers(teacher_steps=2400, teacher_lr=2e-3, teacher_seed=3)
    cfg = Collection(data, teachers, Work(workers=1))
    with at_home():
        return cfg, collect(cfg, quiet=True)


def cells_of(states) -> np.ndarray:
    """Cells of stored states."""
    states = np.asarray(states)
    return states.astype(int) if states.dtype.kind in "iu" else (states * SIDE).round().astype(int)


def check_replay(data):
    """Stored states and rewards are those of the stored actions in each task's grid."""
    for goal, states, actions, rewards in zip(
        data.meta["train_tasks"], data.states, data.actions, data.rewards, strict=True
    ):
        cells = np.zeros((len(states), 2), int)
        for t in range(HORIZON):
            np.testing.assert_array_equal(cells_of(states[:, t]), cells)
            cells = np.clip(cells + MOVES[actions[:, t]], 0, SIDE - 1)
            np.testing.assert_array_equal(rewards[:, t], (cells == goal).all(-1))


def test_dataset_of_a_discrete_family(collected):
    cfg, folder = collected
    data = load_dataset(folder, cfg.data.env)
    assert data.states.shape == (3, 20, HORIZON, 2) and data.query_states.shape == (3, 60, 2)
    assert data.actions.shape == (3, 20, HORIZON) and data.query_actions.shape == (3, 60)
    assert not data.actions.is_floating_point() and not data.query_actions.is_floating_point()
    assert set(data.actions.flatten().tolist()) == {0, 1, 2, 3}
    check_replay(data)


def test_its_teachers_beat_random_and_improve(collected):
    cfg, folder = collected
    data = load_dataset(folder, cfg.data.env)
    for split in ("train", "test"):
        known = {k: np.array(v) for k, v in data.meta["reference"][split].items()}
        goals = np.array(data.meta[f"{split}_tasks"])
        best = HORIZON - goals.sum(1) + 1  # straight there; then it steps off and back again
        assert (known["teacher"] > known["random"] + 0.5).all()
        assert (known["teacher"] <= best).all() and (known["highest"] <= best).all()
    returns = data.returns.numpy()  # in the order of training
    assert returns[:, 14:].mean() > returns[:, :6].mean() + 0.5


def test_its_queries_are_labelled_by_the_best_checkpoint(collected):
    """Its likeliest action, not what the behaviour did."""
    cfg, folder = collected
    data, family = load_dataset(folder, cfg.data.env), get_family(cfg.data.env)
    (teachers,) = Path(cfg.data.datasets).glob("teachers/*")
    group = teachers / "group-000"  # all tasks, in one stack
    with np.load(group / "levels.npz") as file:
        levels = file["mean"].mean(2)
    for i in range(3):
        best = levels[:, i].argmax()
        step = checkpoints(algorithm(cfg.data.env, cfg.teachers))[best]
        inputs = network_input(family, data.query_states[i].numpy())
        label = load_policies(group, [step], i).act(inputs[None])[0]
        assert torch.equal(label, data.query_actions[i].long())
        stored = {tuple(cell) for cell in cells_of(data.states[i]).reshape(-1, 2).tolist()}
        assert {tuple(cell) for cell in cells_of(data.query_states[i]).tolist()} <= stored


@pytest.mark.parametrize("recipe", ["explore", "wander"])
@pytest.mark.parametrize("quality", ["medium-expert", "medium"])
def test_other_recipes_and_qualities(collected, recipe, quality):
    cfg, _ = collected
    with at_home():
        folder = collect(changed(cfg, recipe=recipe, quality=quality), quiet=True)
    data = load_dataset(folder, cfg.data.env)
    check_replay(data)
    assert len(list(Path(cfg.data.datasets).glob("teachers/*"))) == 1
    if recipe == "wander":  # the second half: uniform ids
        count = torch.bincount(data.actions[:, 10:].flatten(), minlength=4)
        assert (count - 60).abs().max() < 5 * 60**0.5 and count.sum() == 240


def test_random_rollout_draws_ids(collected):
    cfg, _ = collected
    first, again, other = (
        rollout(None, cfg.data.env, [[1, 2], [3, 3]], 50, (0, seed), True) for seed in (0, 0, 1)
    )
    assert first["actions"].shape == (2, 50, HORIZON) and first["actions"].dtype == np.int64
    assert (first["actions"] == again["actions"]).all()
    assert (first["actions"] != other["actions"]).any()


# ------------------------------------------------------------------------------------ policies
def test_a_grid_is_read_as_stable_baselines3_reads_it(collected):
    """Of the observation space that Gymnasium is told of."""
    env = collected[0].data.env
    cells = np.stack(np.divmod(np.arange(SIDE**2), SIDE), 1)
    family = get_family(env)
    states = cells if family.state_values else (cells / SIDE).astype(np.float32)
    theirs = preprocess_obs(torch.from_numpy(states), make_env(env, [2, 1]).observation_space)
    assert torch.equal(network_input(family, states), theirs.float())


def test_stacked_discrete_policies_are_the_single_ones():
    rng = torch.Generator().manual_seed(0)
    shapes = (3, 5), (1, 5), (5, 5), (1, 5), (5, 4), (1, 4)
    weights = {n: torch.randn(2, *s, generator=rng) for n, s in zip(WEIGHTS, shapes, strict=True)}
    inputs = torch.randn(2, 30, 3, generator=rng)
    whole = Policies("ppo-discrete", weights).act(inputs)
    assert whole.shape == (2, 30) and len(whole.unique()) > 1
    for m in range(2):
        one = Policies("ppo-discrete", {name: weights[name][m : m + 1] for name in weights})
        assert torch.equal(one.act(inputs[m : m + 1])[0], whole[m])


# ------------------------------------------------------------------------------------ settings
def test_default_settings_grow_with_the_horizon(tmp_path):
    env = write(tmp_path)
    found = algorithm(env, Teachers())
    assert found == PPOConfig(400 * HORIZON, 10 * HORIZON, 2 * HORIZON, save_every=10 * HORIZON)
    assert len(checkpoints(found)) == 40
    assert algorithm(env, Teachers(teacher_steps=800, teacher_lr=0.01)).steps == 800
    with pytest.raises(ValueError, match="PPO, which has no --teacher-hidden"):
        algorithm(env, Teachers(teacher_hidden=8))


@pytest.mark.parametrize("discrete", [True, False])
def test_sac_is_refused_for_ids(tmp_path, discrete):
    """Of actions, and of states."""
    env = write(tmp_path, (SIDE, SIDE), "sac")
    text = Path(env).read_text().replace("discrete_actions=True", f"discrete_actions={discrete}")
    Path(env).write_text(text)
    with pytest.raises(ValueError, match="SAC needs continuous") as error:
        algorithm(env, Teachers())
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- imports
@pytest.mark.parametrize("module", ["collect", "teachers.teachers", "teachers.rollouts"])
def test_nothing_heavy_is_imported_before_it_is_used(module):
    code = f"import sys, {module}; print([name for name in HEAVY if name in sys.modules])"
    code = code.replace("HEAVY", "('stable_baselines3', 'metaworld', 'mujoco', 'matplotlib')")
    line = [sys.executable, "-c", code]
    out = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True, timeout=100)
    assert out.stdout == "[]\n"
