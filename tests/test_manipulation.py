"""Reach and Push (paper App. D.1): step for step the library's own, goals hidden, batches equal to
single tasks.

Run: pytest tests/test_manipulation.py
"""

import copy
import pickle
import warnings

import mujoco
import numpy as np
import pytest
import torch

pytest.importorskip("metaworld")

from gymnasium.utils.env_checker import check_env
from metaworld.envs.sawyer_push_v3 import SawyerPushEnvV3
from metaworld.envs.sawyer_reach_v3 import SawyerReachEnvV3
from metaworld.policies import SawyerPushV3Policy, SawyerReachV3Policy
from metaworld.utils.reward_utils import tolerance
from scipy.spatial.transform import Rotation

from envs import check_tasks, get_family, make_batch, sample_tasks
from families.manipulation import (
    PUSH_GOALS,
    REACH_GOALS,
    BatchedPush,
    BatchedReach,
    Push,
    Reach,
    distance,
    long_tail,
    quaternion,
)

REACH = [[0.08, 0.83, 0.11], [-0.06, 0.9, 0.3], [0.0, 0.8, 0.05]]
PUSH = [[0.08, 0.83], [-0.06, 0.9], [0.0, 0.8]]
FAMILIES = [(Reach, BatchedReach, REACH), (Push, BatchedPush, PUSH)]
EXACT = {"rtol": 0, "atol": 1e-12}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Constant"
)  # the scripted policies ask for more than the clip allows


def library_env(single, goal):
    """The library's environment, told its task as its benchmarks do."""
    env = {Reach: SawyerReachEnvV3, Push: SawyerPushEnvV3}[single]()
    env._set_task_called, env._freeze_rand_vec = True, True
    env._last_rand_vec = np.array([*env.init_config["obj_init_pos"], *goal, 0.015][:6])
    return env


def scripted(single, observation, goal):
    """The action of the library's policy that knows the goal."""
    policy = {Reach: SawyerReachV3Policy, Push: SawyerPushV3Policy}[single]()
    full = np.concatenate([observation, np.zeros(18), [*goal, 0.02][:3]])
    return np.asarray(policy.get_action(full), np.float32)


def behaviour(kind, single, observation, goal, rng):
    if kind == "random":
        return rng.uniform(-1, 1, 4).astype(np.float32)
    action = scripted(single, observation, goal)
    if kind == "noisy":
        return (action + 0.4 * rng.normal(size=4)).astype(np.float32)
    return action * np.float32(5) if kind == "out of range" else action


# ------------------------------------------------------------------------------ as the library does
@pytest.mark.parametrize(("single", "batched", "goals"), FAMILIES)
def test_every_step_is_the_librarys(single, batched, goals):
    rng = np.random.default_rng(0)
    seen = {"success": 0, "grasp_success": 0, "rewards": set()}
    for goal in goals[:2]:
        library, env = library_env(single, goal), single(goal)
        for kind in ("random", "scripted", "noisy", "out of range", "scripted"):
            theirs, ours = library.reset()[0][:18], env.reset()[0]
            np.testing.assert_array_equal(ours, theirs)
            for _ in range(100):
                action = behaviour(kind, single, ours, goal, rng)
                theirs, their_reward, *_, their_info = library.step(np.clip(action, -1, 1))
                ours, reward, terminated, truncated, info = env.step(action)
                np.testing.assert_array_equal(
                    env.data.qpos, library.data.qpos
                )  # the physics: to the last bit
                np.testing.assert_array_equal(env.data.qacc_warmstart, library.data.qacc_warmstart)
                np.testing.assert_allclose(ours, theirs[:18], **EXACT)
                # of Push the library rounds some to float32
                rounding = EXACT if single is Reach else {"rtol": 0, "atol": 2e-6}
                np.testing.assert_allclose(reward, their_reward, **rounding)
                assert (info["success"], terminated, truncated) == (
                    their_info["success"],
                    False,
                    False,
                )
                assert type(reward) is float and type(info["success"]) is float
                seen["success"] += info["success"]
                seen["grasp_success"] += their_info["grasp_success"]
                seen["rewards"].add(round(reward))
    # the trajectories must come by the branches of the reward that are worth comparing
    assert seen["success"] > 50 and seen["grasp_success"] > 5 and {1, 5, 10} <= seen["rewards"]


def test_plain_floats_are_the_librarys_arithmetic():
    rng = np.random.default_rng(0)
    for _ in range(300):
        x, margin, low = (
            rng.uniform(0, 0.3),
            rng.choice([0.0, rng.uniform(0.001, 0.3)]),
            rng.choice([0.0, 0.015]),
        )
        theirs = tolerance(float(x), bounds=(low, 0.05), margin=margin, sigmoid="long_tail")
        np.testing.assert_allclose(long_tail(x, low, 0.05, margin), theirs, **EXACT)
        a, b = rng.normal(size=(2, 3))
        np.testing.assert_allclose(distance(a, b), np.linalg.norm(a - b), **EXACT)
    turns = Rotation.random(300, random_state=0)
    largest = {int(np.argmax(abs(q))) for q in turns.as_quat()}
    assert largest == {0, 1, 2, 3}  # every branch
    for matrix in turns.as_matrix():
        ours, theirs = quaternion(matrix.ravel().tolist()), Rotation.from_matrix(matrix).as_quat()
        np.testing.assert_allclose(ours, theirs, **EXACT)


def test_goal_spaces_and_step_limit_of_the_library():
    reach, push = library_env(Reach, REACH[0]), library_env(Push, PUSH[0])
    np.testing.assert_array_equal(REACH_GOALS, [reach.goal_space.low, reach.goal_space.high])
    np.testing.assert_array_equal(PUSH_GOALS, [push.goal_space.low[:2], push.goal_space.high[:2]])
    env = Reach(REACH[0])
    for _ in range(env.max_path_length + 2):  # the library would raise
        *_, terminated, truncated, _ = env.step(np.zeros(4, np.float32))
        assert not terminated and not truncated


# ---------------------------------------------------------------------------------- numbers by hand
@pytest.mark.parametrize("goal", REACH)
def test_reach_pays_by_the_fingers_distance_to_the_goal(goal):
    env = Reach(goal)
    env.reset()
    _, reward, _, _, info = env.step(np.zeros(4, np.float32))
    fingers = (env.data.site("rightEndEffector").xpos + env.data.site("leftEndEffector").xpos) / 2
    gap = np.sqrt(((fingers - goal) ** 2).sum())
    margin = np.sqrt(((np.array([0, 0.6, 0.2]) - goal) ** 2).sum())
    assert gap > 0.1 and info["success"] == 0
    assert reward == pytest.approx(
        10 / (1 + 9 * ((gap - 0.05) / margin) ** 2), abs=1e-9
    )  # 1 at the margin, 10 at 5 cm
    assert 0.5 < reward < 2


def test_push_pays_ten_within_five_centimetres():
    goal = np.array([0.0, 0.8])
    env = Push(goal)
    for gap, success in ((0.045, 1.0), (0.055, 0.0)):
        env.reset()
        env.data.joint("objjoint").qpos[:2] = goal[0] + gap, goal[1]
        observation, reward, _, _, info = env.step(np.zeros(4, np.float32))
        assert np.linalg.norm(observation[4:6] - goal) == pytest.approx(gap, abs=1e-3)
        assert info["success"] == success
        assert reward == 10 if success else reward < 1


def test_first_observation_by_name():
    env = Push()
    observation, _ = env.reset()
    np.testing.assert_array_equal(observation[:3], env.data.body("hand").xpos)
    np.testing.assert_allclose(observation[:3], [0, 0.6, 0.2], atol=0.01)
    claws = env.data.body("rightclaw").xpos - env.data.body("leftclaw").xpos
    assert (
        observation[3] == pytest.approx(min(np.linalg.norm(claws) / 0.1, 1))
        and observation[3] > 0.9
    )  # open
    np.testing.assert_array_equal(observation[4:7], env.data.body("obj").xpos)
    np.testing.assert_allclose(observation[7:], [0, 0, 0, 1] + [0] * 7, atol=1e-3)


# ---------------------------------------------------------------------------------- goals and tasks
@pytest.mark.parametrize(("single", "batched", "goals"), FAMILIES)
def test_goal_is_not_in_the_observation(single, batched, goals):
    rng = np.random.default_rng(0)
    envs = [single(goal) for goal in goals]
    starts = [env.reset()[0] for env in envs]
    np.testing.assert_array_equal(starts, starts[:1] * len(goals))
    np.testing.assert_allclose(
        starts[0][4:7], [0, 0.6, 0.02], atol=1e-3
    )  # the puck starts there in all tasks
    paid = []
    for step in range(100):
        action = (
            scripted(single, starts[0], goals[0])
            if step < 60
            else rng.uniform(-1, 1, 4).astype(np.float32)
        )
        steps = [env.step(action) for env in envs]
        starts[0] = steps[0][0]
        np.testing.assert_array_equal([s[0] for s in steps], [steps[0][0]] * len(goals))
        paid.append([s[1] for s in steps])
    assert np.ptp(paid, axis=1).max() > 0.1  # but it is in the reward


BAD = [
    [0.0, 0.85],
    [0.0] * 4,
    [0.0, np.nan, 0.1],
    [0, np.inf, 0.1],
    [0.11, 0.85, 0.1],
    [0, 0.79, 0.1],
    [0, 0.9, 0.31],
]


@pytest.mark.parametrize(
    ("single", "task"),
    [(Reach, task) for task in [*BAD, None, 3, "abc", ["0", "0.85", "0.1"], [0, [0.85], 0.1]]]
    + [
        (Push, task)
        for task in [
            [0.0, 0.85, 0.02],
            [0.0],
            [np.nan, 0.85],
            [0, 0.91],
            [-0.11, 0.85],
            [True, True],
        ]
    ],
)
def test_wrong_task_is_one_line(single, task):
    for make in (
        single,
        lambda t: check_tasks(single.__name__.lower(), [t]),
        lambda t: {Reach: BatchedReach, Push: BatchedPush}[single]([t]),
    ):
        line = rf"a task of {single.__name__.lower()} is \d numbers from"
        with pytest.raises(ValueError, match=line) as error:
            make(task)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("single", "low", "high"), [(Reach, *REACH_GOALS), (Push, *PUSH_GOALS)])
def test_corners_of_the_goal_space_are_tasks(single, low, high):
    for task in (low, high):
        (checked,) = check_tasks(single.__name__.lower(), [np.array(task)])
        assert checked == list(task) == single(task).task
        assert all(type(v) is float for v in checked)


# ---------------------------------------------------------------------------------------- gymnasium
@pytest.mark.parametrize("single", [Reach, Push])
def test_gymnasium_accepts_the_environment(single):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(single(), skip_render_check=True)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env)), None]
)
def test_two_instances_do_not_affect_each_other(duplicate):
    env, rng = Push(PUSH[0]), np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (20, 4)).astype(np.float32)
    for action in actions:
        env.step(action)
    if duplicate is None:
        other = Push(PUSH[0])
        for action in actions:
            other.step(action)
    else:
        other = duplicate(env)
    before = env.data.qpos.copy()
    expected = [other.step(action)[:2] for action in actions]
    np.testing.assert_array_equal(env.data.qpos, before)
    for action, (observation, reward) in zip(actions, expected, strict=True):
        ours = env.step(action)
        np.testing.assert_array_equal(ours[0], observation)
        assert ours[1] == reward


# ------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize(("single", "batched", "goals"), FAMILIES)
def test_batch_equals_single_tasks(single, batched, goals):
    rng = np.random.default_rng(0)
    batch, envs = batched(goals), [single(goal) for goal in goals]
    for _ in range(2):
        states, reached = batch.reset(), np.zeros(len(goals), bool)
        np.testing.assert_array_equal(
            states, np.array([env.reset()[0] for env in envs], np.float32)
        )
        assert states.dtype == np.float32 and not batch.success.any()
        for step in range(80):
            kinds = "scripted", "random" if step < 40 else "out of range", "noisy"
            actions = [
                behaviour(k, single, s, g, rng)
                for k, s, g in zip(kinds, states, goals, strict=True)
            ]
            before = states.copy()
            after, rewards = batch.step(np.array(actions))
            np.testing.assert_array_equal(states, before)  # what was handed out does not change
            steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
            np.testing.assert_array_equal(after, np.array([s[0] for s in steps], np.float32))
            np.testing.assert_array_equal(rewards, np.array([s[1] for s in steps], np.float32))
            reached |= np.array([s[4]["success"] for s in steps]) == 1
            np.testing.assert_array_equal(batch.success, reached)
            states = after
        assert (
            rewards.dtype == np.float32
            and rewards.shape == (len(goals),)
            and batch.success.dtype == bool
        )
        assert reached[0]


@pytest.mark.parametrize(("single", "batched", "goals"), FAMILIES)
def test_a_step_earns_in_another_task_what_that_task_would_have_paid(single, batched, goals):
    """Also where the puck is grasped and where it is at the goal. A state says nothing of it."""
    rng, family = np.random.default_rng(0), get_family(single.__name__.lower())
    goals = [*goals, *sample_tasks(family.name, 3, rng)]
    batch = make_batch(family.name, [goals[0]] * len(goals))  # its rows play for their own task ...
    others = [single(goal) for goal in goals]  # ... the same steps that others pay
    states, seen = batch.reset(), set()
    for kind in ["scripted"] * 70 + ["noisy"] * 10 + ["random"] * 20:
        action = behaviour(kind, single, states[0], goals[0], rng)
        states, rewards = batch.step(np.tile(action, (len(goals), 1)))
        want = [env.step(action)[1] for env in others]
        seen |= set(np.round(want))
        for make in (np.asarray, torch.tensor):
            tasks = make(np.array(goals, np.float32))
            got = family.reward(make(batch.outcome), tasks)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rewards, want[0], rtol=1e-6)
    assert seen >= {1, 7, 10} and len(seen) > 5


def test_reachs_lesson_pays_best_in_the_goal_where_its_reward_is_flat():
    """Within 5 cm, and less at every further step away; NumPy's numbers are torch's."""
    goal = np.array(REACH[0])
    outcomes = goal + np.linspace(0, 0.3, 31)[:, None] * [0.6, 0.0, 0.8]
    family = get_family("reach")
    lesson, reward = family.lesson(outcomes, goal), family.reward(outcomes, goal)
    assert lesson[0] == 10 and (np.diff(lesson) < 0).all() and lesson[10] == pytest.approx(5)
    assert (reward[:5] == 10).all() and reward[6] < 10
    torch.testing.assert_close(
        family.lesson(torch.tensor(outcomes), torch.tensor(goal)), torch.tensor(lesson)
    )


def test_demonstrations_of_push_are_the_librarys_and_all_succeed():
    """Warm-up of the one teacher: no warning, bounded, and the goal of each row its own."""
    goals = sample_tasks("push", 6, np.random.default_rng(2))
    batch = make_batch("push", goals)
    states, total, demonstrate = batch.reset(), 0, get_family("push").demonstrate
    for step in range(100):
        with warnings.catch_warnings(action="error"):
            actions = demonstrate(states, np.array(goals))
        assert actions.shape == (6, 4) and actions.dtype == np.float32
        if step % 20 == 0:
            want = [scripted(Push, *row).clip(-1, 1) for row in zip(states, goals, strict=True)]
            np.testing.assert_array_equal(actions, want)
        states, rewards = batch.step(actions)
        total = total + rewards
    assert batch.success.all() and total.min() > 600, total


def test_success_stays_until_the_reset():
    batch, away = BatchedReach(REACH[:2]), np.array([0, -1, 0, 0], np.float32)
    states = batch.reset()
    for _ in range(80):
        states, _ = batch.step(np.array([scripted(Reach, states[0], REACH[0]), away]))
    assert batch.success.tolist() == [True, False]
    for _ in range(40):
        _, rewards = batch.step(np.array([away, away]))
    assert rewards[0] < 9 and batch.success.tolist() == [True, False]
    batch.reset()
    assert batch.success.tolist() == [False, False]


def test_batch_is_small_and_wants_an_action_for_each_task():
    batch = BatchedPush(PUSH * 100)
    assert batch.rows.nbytes < 300 * 4096  # one simulator, one model
    assert batch.rows.shape[1] == mujoco.mj_stateSize(
        batch.simulator.model, mujoco.mjtState.mjSTATE_INTEGRATION
    )
    with pytest.raises(ValueError, match="zip"):
        batch.step(np.zeros((2, 4)))
