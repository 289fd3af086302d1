"""test_policies.py: what the policies of all methods share: the choice of an action, noise, search.

Run: python -m pytest -q tests/test_policies.py
"""

import pytest
import torch
import toys
from toys import GRID, PLANE, method

from ad import ADBatch
from config import Play
from models import ModelSettings
from policies import check_play, choose
from support.settings import check_types


def test_choose_samples_the_softmax_or_takes_the_best():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).expand(40_000, 3)
    taken = choose(logits, False, torch.Generator().manual_seed(0)).bincount(minlength=3) / 40_000
    torch.testing.assert_close(taken, logits[0].softmax(-1), atol=0.01, rtol=0)
    assert (choose(logits, True, torch.Generator()) == 1).all()
    some = torch.arange(40_000) < 30_000  # each row as it says
    mixed = choose(logits, some, torch.Generator().manual_seed(0))
    assert (mixed[some] == 1).all() and 0 < (mixed[~some] == 0).float().mean() < 1
    assert taken[2] == 0


@pytest.mark.parametrize("layout", ["ad", "first", "last"])
def test_a_first_episode_of_random_actions(layout):
    """Every action equally often, whatever the model says; the second episode is the model's."""
    tiny = method(layout, GRID, first="random", actions="greedy")
    policy = tiny.policy(tiny.cfg.play)
    policy.begin([], 3000)
    logits = torch.tensor([[5.0, 0.0, 0.0]]).expand(3000, 3)
    share = policy.action(logits).bincount(minlength=3) / 3000
    assert (share - 1 / 3).abs().max() < 5 * (2 / 9 / 3000) ** 0.5
    prompt = toys.draw(tiny.model, rows=3000, steps=3).prompt
    policy.begin([prompt], 3000)
    assert (policy.action(logits) == 0).all()


@pytest.mark.parametrize("layout", ["ad", "last"])
@torch.no_grad()
def test_noise_has_its_deviation_around_the_mean_action(layout):
    """The network reads the actions that were played, noise included."""
    tiny = toys.point_method(layout, noise=0.25)
    tiny.model.head.weight.data *= 0.2  # mean actions mostly away from the walls
    episodes, again = toys.play_points(tiny), toys.play_points(tiny)
    assert all(torch.equal(a.actions, b.actions) for a, b in zip(episodes, again, strict=True))
    first = toys.shown(episodes[0])
    if layout == "ad":
        mean = tiny.model(ADBatch(first, torch.arange(3))).action
    else:
        queries = first.states.split(1, 1)
        actions = [tiny.model(toys.ask(toys.no_points(), query)).action for query in queries]
        mean = torch.cat(actions, 1)
    noise, inside = episodes[0].actions - mean, episodes[0].actions.abs() < 1
    assert episodes[0].actions.abs().max() <= 1 and inside.float().mean() > 0.5
    inner = noise[mean.abs() < 0.25]  # three deviations from the nearest wall
    within = 4 / (2 * len(inner)) ** 0.5
    assert len(inner) > 10 and inner.std().item() == pytest.approx(0.25, rel=within)
    assert abs(inner.mean().item()) < 4 * 0.25 / len(inner) ** 0.5


@pytest.mark.parametrize(
    "noise, named",
    [
        (-0.1, "--noise -0.1: it should be greater than or equal to 0"),
        (float("nan"), "--noise nan"),
        (float("inf"), "--noise inf"),
        (0.1, "continuous actions"),
    ],
)
def test_impossible_noise_is_refused(noise, named):
    with pytest.raises(ValueError, match=named) as error:
        check_types(Play(noise=noise))
        check_play(ModelSettings(), Play(noise=noise), GRID)
    assert "\n" not in str(error.value)
    check_play(ModelSettings(), Play(noise=0.1), PLANE)
    check_play(ModelSettings(), Play(noise=0.0), GRID)
    with pytest.raises(ValueError, match="continuous actions"):  # also where a policy is made
        method("ad", GRID).policy(method("ad", GRID, noise=0.1).cfg.play)


# ------------------------------------------------------------------ --temperature, --actions search
@pytest.mark.parametrize("actions", ["sample", "search"])
@pytest.mark.parametrize("layout", ["ad", "first", "last"])
def test_draws_follow_p_to_the_power_of_one_over_the_temperature(layout, actions):
    """All of them, or (search) of those alone who have read no reward that differs from another."""
    rows, temperature = 8000, 4.0
    tiny = method(layout, GRID, temperature=temperature, actions=actions)
    policy = tiny.policy(tiny.cfg.play)
    prompt = toys.draw(tiny.model, rows=rows, steps=toys.T).prompt
    prompt.rewards = torch.zeros(rows, toys.T)
    prompt.rewards[rows // 2 :, 1] = 1.0
    policy.begin([prompt], rows)
    logits = torch.tensor([[2.0, 0.0, -torch.inf]]).expand(rows, 3)
    taken = policy.action(logits).view(2, -1)
    power = logits[0].softmax(-1) ** (1 / temperature)  # what is never right stays so: 0
    want = (power / power.sum()).repeat(2, 1)
    if actions == "search":
        want[1] = torch.tensor([1.0, 0.0, 0.0])
    for half, probability in zip(taken, want, strict=True):
        share = half.bincount(minlength=3) / len(half)
        assert (share - probability).abs().max() < 5 * 0.5 / len(half) ** 0.5


@pytest.mark.parametrize("memory", ["last", "all"])
def test_a_search_begins_anew_where_the_reward_is_forgotten(memory):
    tiny = method("last", GRID, prompt=memory)
    policy = tiny.policy(tiny.cfg.play)
    found, nothing = (toys.draw(tiny.model, rows=2, steps=toys.T).prompt for _ in range(2))
    found.rewards = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    nothing.rewards = torch.zeros(2, toys.T)
    begun = [[], [nothing], [nothing, found], [nothing, found, nothing]]
    searches = []
    for history in begun:
        policy.begin(history, 2)
        searches.append(policy.searching().tolist())
    assert searches[:3] == [[True, True], [True, True], [True, False]]
    assert searches[3] == [True, memory == "last"]


@pytest.mark.parametrize("layout", ["ad", "first", "last"])
def test_an_episode_that_stays_at_the_goal_is_known_by_those_that_did_not(layout):
    """Its rewards are all alike: without another episode that says nothing."""
    tiny = method(layout, GRID)
    policy = tiny.policy(tiny.cfg.play)
    nothing, stays = (toys.draw(tiny.model, rows=1, steps=toys.T).prompt for _ in range(2))
    nothing.rewards, stays.rewards = torch.zeros(1, toys.T), torch.ones(1, toys.T)
    for history, searches in (([stays], True), ([nothing, stays], False), ([nothing] * 2, True)):
        policy.begin(history, 1)
        assert policy.searching().tolist() == [searches]


@pytest.mark.parametrize("layout, reads", [("ad", True), ("last", False)])
def test_ad_reads_the_rewards_of_the_running_episode(layout, reads):
    """DPT's prompt is frozen during an episode: what it does not read it goes on searching for."""
    tiny = method(layout, GRID)
    policy = tiny.policy(tiny.cfg.play)
    policy.begin([], 2)
    states = torch.zeros(2, 2, dtype=torch.int64)
    for rewards, searches in (([1.0, 1.0], [True, True]), ([1.0, 0.0], [True, not reads])):
        actions = policy.act(states)
        policy.observe(states, actions, torch.tensor(rewards))
        assert policy.searching().tolist() == searches


def test_a_temperature_is_for_what_is_drawn():
    network, mixed = ModelSettings(), ModelSettings(components=2)
    check_play(network, Play(temperature=4.0), GRID)
    check_play(network, Play(temperature=1.0), PLANE)
    check_play(mixed, Play(temperature=4.0), PLANE)
    with pytest.raises(ValueError, match="--temperature is for what is drawn"):
        check_play(network, Play(temperature=4.0), PLANE)
    with pytest.raises(ValueError, match="--temperature 0"):
        check_types(Play(temperature=0.0))
