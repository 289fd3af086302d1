"""A family of the user's: a Python file with one `Family` plays as those of the paper do.

Run: pytest tests/test_user_family.py
"""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import (
    FAMILIES,
    check_tasks,
    get_family,
    make_batch,
    make_env,
    optimal_returns,
    random_returns,
    sample_tasks,
    split_tasks,
)

ROOT = Path(__file__).resolve().parent.parent

CART = '''
"""A cart on a line looks for a hidden place; the friction is hidden too."""
import numpy as np
from envs import Family


class Carts:
    def __init__(self, tasks, seed=0):
        self.tasks, self.rng = np.asarray(tasks, float), np.random.default_rng(seed)

    def reset(self):
        self.x, self.v = np.zeros(len(self.tasks)), self.rng.uniform(-0.1, 0.1, len(self.tasks))
        return self.observe()

    def step(self, actions):
        place, friction = self.tasks.T
        self.v = (1 - friction) * self.v + 0.1 * np.clip(actions[:, 0], -1, 1)
        self.x = self.x + self.v
        return self.observe(), -np.abs(self.x - place).astype(np.float32)

    def observe(self):
        return np.stack([self.x, self.v], 1).astype(np.float32)


def sample_tasks(count, rng):
    return np.stack([rng.uniform(-1, 1, count), rng.uniform(0.1, 0.5, count)], 1)


CART = Family("cart", horizon=30, state_dim=2, action_dim=1, train_tasks=20, test_tasks=5,
              task_low=(-1.0, 0.1), task_high=(1.0, 0.5), batch=Carts, sample_tasks=sample_tasks)
'''

PAID = (
    CART.replace("batch=Carts", "batch=Carts, reward=paid")
    .replace(
        "        return self.observe(), -np",
        "        self.outcome = self.x[:, None]\n        return self.observe(), -np",
    )
    .replace(
        "CART = ",
        "def paid(outcomes, tasks):\n    return -abs(outcomes[..., 0] - tasks[..., 0])\n\nCART = ",
    )
)

LEVERS = '''
"""Three levers; one of them pays. A task is its number. The state counts the pulls of each."""
import numpy as np
from envs import Family


class Levers:
    def __init__(self, tasks, seed=0):
        self.lever = np.asarray(tasks, int)[:, 0]

    def reset(self):
        self.pulls = np.zeros((len(self.lever), 3), np.int64)
        return self.pulls.copy()

    def step(self, actions):
        self.pulls[np.arange(len(actions)), actions] += 1
        return self.pulls.copy(), (actions == self.lever).astype(np.float32)


OWN = Family("levers", horizon=12, state_dim=3, action_dim=3, train_tasks=2, test_tasks=1,
             task_low=(0,), task_high=(2,), batch=Levers, teacher="ppo",
             sample_tasks=lambda count, rng: rng.permutation(3)[:count],
             split_tasks=lambda seed, train, test: ([[0], [2]], [[1]]),
             optimal_returns=lambda tasks: np.full(len(tasks), 12.0),
             state_values=(13, 13, 13), discrete_actions=True)
'''


@pytest.fixture
def write(tmp_path):
    """write(text) -> `--env` of a file that holds it."""

    def write(text, name="own.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# ----------------------------------------------------------------------------------- what goes well
def test_facts(write):
    cart, levers = write(CART, "cart.py"), write(LEVERS, "levers.py")
    assert (get_family(cart).name, get_family(levers).name) == ("cart", "levers")
    assert get_family(cart) is get_family(cart)  # the file is run once
    assert (get_family(cart).task_numbers, get_family(levers).task_numbers) == (2, 1)
    assert get_family(cart).teacher == "sac" and get_family(levers).discrete_actions


def test_tasks_of_a_continuous_family(write):
    env = write(CART)
    train, held_out = split_tasks(env, 3)
    assert (len(train), len(held_out)) == (20, 5) and split_tasks(env, 3) == (train, held_out)
    assert check_tasks(env, train + held_out) == train + held_out
    assert train == sample_tasks(env, 20, np.random.default_rng([3, 0]))
    with pytest.raises(ValueError, match=r"a task of cart is 2 numbers from .*, not \[0, 0.6\]"):
        check_tasks(env, [[0, 0.6]])
    assert optimal_returns(env, held_out) is None


def test_tasks_of_a_discrete_family(write):
    env = write(LEVERS)
    assert split_tasks(env) == ([[0], [2]], [[1]])
    assert sorted(sample_tasks(env, 3, np.random.default_rng(0))) == [[0], [1], [2]]
    assert optimal_returns(env, [[0], [1]]).tolist() == [12, 12]


def test_random_actions_of_a_continuous_family(write):
    env, task, rng = write(CART), [0.5, 0.2], np.random.default_rng(9)
    batch, returns = make_batch(env, [task] * 2000, seed=8), 0.0
    batch.reset()
    for _ in range(30):
        returns = returns + batch.step(rng.uniform(-1, 1, (2000, 1)))[1]
    error = returns.std() * np.sqrt(1 / 2000 + 1 / 500)
    assert random_returns(env, [task], 500) == pytest.approx(returns.mean(), abs=4.5 * error)
    assert random_returns(env, [task, [0, 0.2]], 5).shape == (2,)


def test_random_actions_of_a_discrete_family(write):
    """Each lever is pulled in a third of the steps, and nothing but a lever."""
    returns = random_returns(write(LEVERS), [[0], [1], [2]], 500)
    np.testing.assert_allclose(returns, 4, atol=4.5 * np.sqrt(12 * 2 / 9 / 500))


@pytest.mark.parametrize(("text", "task"), [(CART, [0.4, 0.2]), (LEVERS, [1])])
def test_gymnasium_environment_is_a_batch_of_one(write, text, task):
    env = write(text)
    family, single, batch = get_family(env), make_env(env, task), make_batch(env, [task] * 2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(make_env(env, task).unwrapped, skip_render_check=True)
    assert batch.family is family and batch.success is None
    batch.rng = np.random.default_rng(7)
    single.action_space.seed(0)
    states, (state, _) = batch.reset(), single.reset(seed=7)
    ends = []
    for _ in range(family.horizon):
        if text == LEVERS or not ends:  # the first row's start is the one of the same seed
            np.testing.assert_array_equal(state, states[0])
        assert single.observation_space.contains(state)
        action = single.action_space.sample()
        states, rewards = batch.step(np.stack([action] * 2))
        state, reward, terminated, truncated, _ = single.step(action)
        ends.append((terminated, truncated))
        if text == LEVERS:
            assert reward == rewards[0]
    assert ends == [(False, False)] * (family.horizon - 1) + [(False, True)]
    with pytest.raises(ValueError, match="a task of"):
        make_env(env, [99] * family.task_numbers)


def test_seeds_of_the_gymnasium_environment(write):
    """A seed fixes the starts, as Gymnasium has it; without one the stream goes on."""
    env = make_env(write(CART), [0.4, 0.2])
    starts = [env.reset(seed=3)[0][1], env.reset()[0][1], env.reset(seed=3)[0][1]]
    assert starts[0] == starts[2] != starts[1]
    assert starts[0] == np.float32(np.random.default_rng(3).uniform(-0.1, 0.1))


def test_success_is_told(write):
    text = LEVERS.replace("state_values", "can_succeed=True, state_values")
    text = text.replace("    def step", "    success = np.array([True])\n\n    def step")
    env = write(text)
    single = make_env(env, [1])
    single.reset(seed=0)
    assert single.step(1)[4] == {"success": 1.0}
    assert make_batch(env, [[1]]).success.tolist() == [True]


def test_a_file_with_dataclasses_and_a_builtin_family_at_hand(write):
    """Annotations as text need the module to be findable; other families are read by module."""
    env = write(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, replace\n"
        "from families import point_robot\n\n"
        "@dataclass\nclass Size:\n    side: float = 1.0\n\n"
        "SMALL = replace(point_robot.POINT_ROBOT, name='small', horizon=7)\n"
        "ALSO = SMALL\n"
    )
    assert (get_family(env).name, get_family(env).horizon) == ("small", 7)


# ---------------------------------------------------------------------------------- what goes wrong
BAD_FILES = [
    ("", "it must hold exactly one envs.Family, .* it holds none"),
    ("from families.darkroom import *\nfrom families.point_robot import *", "it holds 2"),
    ("CART = {'horizon': 3}", "it holds none"),
    ("SPEC = 1\nclass Batch: pass\ndef sample_tasks(count, rng): ...", "it holds none"),
    ("from envs import Family\nOWN = Family", "it holds none"),
    ("x = 1\ndef f(:\n", r"SyntaxError: invalid syntax \(own.py, line 2\)"),
    ("import nowhere_to_be_found", "line 1: ModuleNotFoundError: No module named 'nowhere"),
    ("from envs import Batch, nothing_such", "line 1: ImportError: cannot import name 'nothing"),
    ("import json\n\njson.loads('{')", "line 3: JSONDecodeError: Expecting property name"),
    ("import sys\n\nsys.exit(3)", "line 3: SystemExit: 3"),
    ("raise RuntimeError('first\\nsecond')", "line 1: RuntimeError: first second"),
    ("from envs import Family\n\nA = Family('a')", r"line 3: TypeError: .* missing \d+ required"),
    (
        CART.replace("horizon=30", "horizon=0"),
        "ValueError: family 'cart': its sizes: positive whole",
    ),
    (CART.replace("horizon=30", "horizon=30.0"), "its sizes: positive whole numbers"),
    (CART.replace('"cart"', '"../cart"'), "its name: letters, digits"),
    (CART.replace("(1.0, 0.5)", "(1.0,)"), "one per number"),
    (CART.replace("batch=Carts", "batch=None"), "batch and sample_tasks must be functions"),
    (LEVERS.replace('"ppo"', '"dqn"'), "its teacher must be sac, ppo or rule"),
    (LEVERS.replace('"ppo"', '"rule"'), "a rule needs collect_task"),
    (LEVERS.replace('"ppo"', '"sac"'), "SAC needs continuous actions"),
    (CART.replace("low=(-1.0", "low=(1.5"), "its limits: finite, low <= high"),
    (CART.replace("(1.0, 0.5)", "(1.0, np.inf)"), "its limits: finite, low <= high"),
    (CART.replace("(1.0, 0.5)", "(1.0, np.nan)"), "its limits: finite, low <= high"),
    (CART.replace("batch=", "reward_scale=0, batch="), "reward_scale must not be 0"),
    (CART.replace("batch=", "state_values=(3,), batch="), "state_values, state_units: one per"),
    (CART.replace("batch=", "state_units=((0, 0), (1,)), batch="), "state_values, state_units"),
    (CART.replace("batch=", "state_units=((0, 0), (1, 0)), batch="), "no unit may be 0"),
    (CART.replace("batch=", "state_units=((0, 0),), batch="), "no unit may be 0"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_wrong_file_is_one_line(write, text, message):
    env = write(text)
    with pytest.raises(ValueError, match=message) as error:
        get_family(env)
    assert str(error.value).startswith(f"--env {env}:") and "\n" not in str(error.value)


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        get_family(str(tmp_path / "none.py"))


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (CART, "1).astype(np.float32)", "1)", r"reset's states .* float32 .*, not float64"),
        (CART, "[self.x, self.v], 1", "[self.x, self.v], 0", r"shape \(3, 2\) .* \(2, 3\)"),
        (CART, "place).astype(np.float32)", "place)", "step's rewards .* float32"),
        (LEVERS, "return self.pulls.copy(), (", "return self.pulls[0], (", "step's states"),
        (LEVERS, "3), np.int64", "3), np.int32", "int64 of shape .*, not int32"),
        (CART, "rng.uniform(0.1, 0.5, count)], 1", "np.zeros(count)] * 2, 1", "sample_tasks of"),
        (CART, "self.x = self.x + self.v", "self.x = self.y", r"line \d+: AttributeError: .*'y'"),
        (CART, "self.tasks, self.rng =", "1 / 0; self.tasks, self.rng =", r"line \d+: ZeroDiv"),
        (CART, "return np.stack([rng.uniform(-1", "return nothing([rng.uniform(-1", "NameError: "),
        (CART, "batch=Carts", "batch=Carts, reward=min", "step must set `outcome`"),
        (CART, "batch=Carts", "batch=Carts, lesson=min", "step must set `outcome`"),
        (CART, "-np.abs(self.x", "np.nan * np.abs(self.x", "step's rewards of 3 tasks .* finite"),
        (LEVERS, "return self.pulls.copy()\n", "return self.pulls\n", "must return a new array"),
        (
            PAID,
            "return -abs(o",
            "return abs(o",
            "reward of step's outcome must be what step has paid",
        ),
        (PAID, "return -abs(o", "return nothing(o", r"line \d+: NameError"),
    ],
)
def test_wrong_batch_is_one_line_before_any_work(write, text, old, new, message):
    assert old in text
    env = write(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        make_batch(env, [[0, 0.2]])
    assert "\n" not in str(error.value)


def test_rewards_of_an_outcome_are_what_a_step_pays(write):
    make_batch(write(PAID), [[0, 0.2]])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("([[0], [2]], [[1]])", "([[0], [1]], [[1]])", "holds out .1.0., which is also a training"),
        ("([[0], [2]], [[1]])", "([[0], [7]], [[1]])", "a task of levers is 1 number from"),
        ("([[0], [2]], [[1]])", "nothing", r"line \d+: NameError"),
    ],
)
def test_wrong_split_is_one_line(write, old, new, message):
    env = write(LEVERS.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        split_tasks(env)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("new", "message"),
    [("np.full(1, 12.0)", r"returns of 2 tasks have shape \(1,\)"), ("nothing", r"line \d+: Name")],
)
def test_wrong_returns_are_one_line(write, new, message):
    env = write(LEVERS.replace("np.full(len(tasks), 12.0)", new))
    with pytest.raises(ValueError, match=message):
        optimal_returns(env, [[0], [1]])


# ------------------------------------------------------------------------- what is loaded, and when
@pytest.mark.parametrize("env", [None, "darkroom", "point-robot"])
def test_no_simulator_loads_unless_it_is_played(env):
    asked = f"envs.get_family({env!r}); envs.split_tasks({env!r})" if env else "pass"
    code = f"import sys, envs; {asked}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "envs" in loaded and not loaded & {"mujoco", "metaworld", "stable_baselines3", "torch"}


def test_names_lead_to_families_of_that_name():
    for env in ("darkroom", "point-robot", "cheetah-vel", "cheetah-vel-3cluster", "walker-param"):
        assert get_family(env).name == env in FAMILIES


def test_demo_prints_every_family():
    """Run as a script, envs.py is read twice; its families are still found."""
    pytest.importorskip("metaworld")
    done = subprocess.run(
        [sys.executable, "envs.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[: len(FAMILIES)]] == list(FAMILIES)
    assert len(lines) == len(FAMILIES) + 10 and done.stdout.count("G") == 1
