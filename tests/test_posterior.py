"""The exact in-context policy of DarkRoom (what Eq. 11 converges to); its returns in Algorithm 4.

Run: pytest tests/test_posterior.py
"""

import numpy as np
import pytest
import torch

from data import Prompt
from dpt import DPTSettings, sample_dpt
from evaluate import play
from families.darkroom import darkroom_teacher
from families.posterior import (
    CELLS,
    ExactPosterior,
    action_posterior,
    divergence,
    goal_posterior,
)

RIGHT, LEFT, UP, DOWN, STAY = range(5)


def prompt(*rows):
    """Rows of (cell, action, reward) steps."""
    states, actions, rewards = (
        torch.tensor([[step[i] for step in row] for row in rows]) for i in range(3)
    )
    return Prompt(states, actions, rewards.float())


def uniform_without(*cells):
    belief = torch.ones(10, 10)
    for x, y in cells:
        belief[x, y] = 0
    return belief.flatten() / belief.sum()


# ------------------------------------------------------------------------------- posterior of goals
def test_nothing_seen_is_uniform():
    torch.testing.assert_close(goal_posterior(None, rows=3), torch.full((3, 100), 0.01))
    nothing = Prompt(torch.zeros(1, 0, 2).long(), torch.zeros(1, 0).long(), torch.zeros(1, 0))
    torch.testing.assert_close(goal_posterior(nothing), torch.full((1, 100), 0.01))


def test_without_reward_the_goal_is_in_a_cell_that_was_not_entered():
    belief = goal_posterior(
        prompt(
            [((0, 0), RIGHT, 0), ((1, 0), UP, 0), ((1, 1), STAY, 0)],
            [
                ((0, 0), LEFT, 0),
                ((0, 0), DOWN, 0),
                ((0, 0), STAY, 0),
            ],  # walls: the corner is entered
            [((9, 8), UP, 0), ((9, 9), UP, 0), ((9, 9), RIGHT, 0)],
        )
    )
    want = [
        uniform_without((1, 0), (1, 1)),  # not (0, 0): no move has ended there
        uniform_without((0, 0)),
        uniform_without((9, 9)),  # not (9, 8), where the first state stands
    ]
    torch.testing.assert_close(belief, torch.stack(want))


def test_reward_is_of_the_cell_after_the_move():
    belief = goal_posterior(
        prompt(
            [((0, 0), RIGHT, 0), ((1, 0), UP, 1), ((1, 1), UP, 0)],
            [((0, 0), DOWN, 1), ((0, 0), RIGHT, 0), ((1, 0), LEFT, 1)],
            [((0, 0), RIGHT, 0), ((1, 0), RIGHT, 0), ((2, 0), STAY, 0)],  # rows do not mix
        )
    )
    assert belief[0].nonzero().tolist() == [[11]] and belief[0, 11] == 1
    assert belief[1].nonzero().tolist() == [[0]] and belief[1, 0] == 1
    torch.testing.assert_close(belief[2], uniform_without((1, 0), (2, 0)))


def test_belief_never_rules_out_the_true_goal(explore_data):
    rng = torch.Generator().manual_seed(0)
    batch = sample_dpt(explore_data, 8, 1, 1, rng, DPTSettings())
    belief = goal_posterior(batch.prompt)
    goals = torch.tensor(explore_data.meta["train_tasks"])[batch.task] @ torch.tensor([10, 1])
    mass = belief[torch.arange(8), goals]
    paid = (batch.prompt.rewards > 0).any(1)
    assert paid.any() and (mass[paid] == 1).all() and (mass >= 0.01).all()
    torch.testing.assert_close(belief.sum(1), torch.ones(8))


def test_only_goals_that_the_prior_allows_are_looked_for():
    """And a reward names its cell all the same."""
    prior = torch.zeros(100)
    prior[[1, 37]] = torch.tensor([0.25, 0.75])
    policy = ExactPosterior(goals=[[0, 1], [3, 7]])
    policy.begin([], rows=2)
    assert policy.belief.nonzero()[:, 1].tolist() == [1, 37] * 2 and (policy.belief.max() == 0.5)
    belief = goal_posterior(
        prompt(
            [((0, 0), RIGHT, 0), ((1, 0), UP, 0)],  # neither
            [((0, 0), UP, 0), ((0, 1), RIGHT, 0)],  # (0, 1)
            [((0, 0), UP, 0), ((3, 6), UP, 0)],  # both: nothing has been learnt
            [((0, 0), RIGHT, 1), ((1, 0), UP, 0)],  # a goal that was not possible
        ),
        prior=prior,
    )
    want = torch.stack([prior, *torch.eye(100)[[37]], prior, *torch.eye(100)[[10]]])
    torch.testing.assert_close(belief, want)


# ----------------------------------------------------------------------------- posterior of actions
def slow_action_posterior(belief, states):
    want = torch.zeros(*states.shape[:2], 5)
    for b in range(states.shape[0]):
        for q in range(states.shape[1]):
            for goal in range(100):
                action = int(darkroom_teacher(states[b, q].numpy(), CELLS[goal]))
                want[b, q, action] += belief[b, goal]
    return want


def test_action_posterior_is_the_teacher_averaged_over_goals():
    rng = torch.Generator().manual_seed(0)
    states = torch.randint(10, (3, 6, 2), generator=rng)
    belief = torch.rand(3, 100, generator=rng)
    belief[1] = goal_posterior(None)[0]
    belief = belief / belief.sum(1, keepdim=True)
    torch.testing.assert_close(
        action_posterior(belief, states), slow_action_posterior(belief, states)
    )


def test_action_posterior_by_hand():
    corner = action_posterior(goal_posterior(None), torch.tensor([[[0, 0]]]))[0, 0]
    torch.testing.assert_close(corner, torch.tensor([0.90, 0, 0.09, 0, 0.01]))
    known = torch.zeros(1, 100)
    known[0, 37] = 1
    actions = action_posterior(known, torch.tensor([[[2, 9], [8, 7], [3, 9], [3, 0], [3, 7]]]))[0]
    torch.testing.assert_close(actions, torch.eye(5)[[RIGHT, LEFT, DOWN, UP, STAY]])


# --------------------------------------------------------------------------------------- divergence
@pytest.fixture
def case():
    paid = [((0, 0), RIGHT, 0), ((1, 0), UP, 1)]
    unpaid = [((0, 0), RIGHT, 0), ((1, 0), UP, 0)]
    rng = torch.Generator().manual_seed(1)
    return prompt(paid, unpaid, paid), torch.randint(10, (3, 7, 2), generator=rng)


def test_divergence_is_positive_unless_the_policy_is_exact(case):
    seen, states = case
    exact = action_posterior(goal_posterior(seen), states)
    kl, rewarded = divergence(seen, states, exact.clamp(min=1e-30).log())
    torch.testing.assert_close(kl, torch.zeros(3, 7), atol=1e-6, rtol=0)
    assert rewarded.tolist() == [True, False, True]
    other = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    kl, _ = divergence(seen, states, other)
    assert (kl > 1e-3).all()
    exact, other = (torch.distributions.Categorical(p) for p in (exact, other.exp()))
    want = torch.distributions.kl_divergence(exact, other)
    torch.testing.assert_close(kl, want)


def test_divergence_of_a_policy_that_excludes_actions(case):
    """log 0 is harmless where the exact policy never acts so, and infinite where it does."""
    seen, states = case
    exact = action_posterior(goal_posterior(seen), states)
    torch.testing.assert_close(
        divergence(seen, states, exact.log())[0], torch.zeros(3, 7), atol=1e-6, rtol=0
    )
    wrong = torch.full((3, 7, 5), -torch.inf)
    wrong[..., STAY] = 0
    kl, _ = divergence(seen, torch.zeros(3, 7, 2).long(), wrong)
    assert (kl == torch.inf).all()


# ------------------------------------------------------------------------- playing it (Algorithm 4)
REPEATS = 10


def check_table(returns, want):
    """Mean return of some episodes within four standard errors of exact ceilings."""
    for episode, value in want.items():
        got = returns[:, episode - 1]
        assert got.mean() == pytest.approx(value, abs=4 * got.std() / np.sqrt(len(got)) + 0.1), (
            episode
        )


@pytest.mark.parametrize(
    ("memory", "want"),
    [("last", {1: 1.1, 5: 51.2, 10: 61.8}), ("all", {1: 1.1, 5: 53.6, 10: 77.2})],
)
def test_returns_of_the_sampled_posterior(memory, want):
    returns = play("darkroom", CELLS.tolist() * REPEATS, ExactPosterior(memory, seed=0), 10)
    assert returns.shape == (100 * REPEATS, 10)
    check_table(returns, want)
    if memory == "all":  # what was found once is never lost: the best return follows
        found = returns[:, :5].max(1) > 0
        best = 101 - np.maximum(np.tile(CELLS, (REPEATS, 1)).sum(1), 1)
        np.testing.assert_array_equal(returns[found, 5:], np.repeat(best[found, None], 5, 1))


def test_what_was_never_a_goal_is_found_by_chance_alone():
    """A DPT that was trained on no goal near the far corner does not look there."""
    goals = [cell for cell in CELLS.tolist() if min(cell) < 7]
    corner = [[9, 9]] * 20
    known, not_known = (
        play("darkroom", corner, ExactPosterior("all", goals=held), 25)[:, -1]
        for held in (None, goals)
    )
    assert (known > 0).mean() > 0.9 and (not_known > 0).mean() < 0.3


@pytest.mark.parametrize("memory", ["last", "all"])
def test_flatter_draws_search_better(memory):
    """The mean of all goals' actions leads to the middle; what was found is played as before."""
    played = []
    for temperature in (1.0, 4.0):
        policy = ExactPosterior(memory, temperature=temperature)
        played.append(play("darkroom", CELLS.tolist() * 3, policy, 12)[:, 1:])  # (300, 11)
    found = [(returns > 0).any(1).mean() for returns in played]
    assert found[1] > found[0] + 0.05
    best = 101 - np.maximum(np.tile(CELLS, (3, 1)).sum(1), 1)
    for returns in played:
        after = returns[:, 1:][returns[:, :-1] > 0]  # the prompt has a reward
        np.testing.assert_array_equal(after, np.repeat(best[:, None], 10, 1)[returns[:, :-1] > 0])


@pytest.mark.parametrize("memory", ["last", "all"])
def test_arg_max_of_the_posterior_fails(memory):
    """It walks to the middle and oscillates there for ever."""
    returns = play("darkroom", CELLS.tolist(), ExactPosterior(memory, greedy=True), 5).mean(0)
    assert returns[0] == pytest.approx(1.0, abs=0.1)
    np.testing.assert_allclose(returns[1:], 4.9, atol=0.1)


def test_seed_determines_play():
    goals = CELLS[::9].tolist()
    first, again, other = (
        play("darkroom", goals, ExactPosterior(seed=seed), 5) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
