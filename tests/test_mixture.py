"""test_mixture.py: a head of several Gaussians (--components): its loss, its play, its settings.

Against torch.distributions; by counting what is drawn; on actions that go either way.
Run: pytest tests/test_mixture.py
"""

import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import toys
from commands import at_home, rewrite, run
from tiny import command, differing, trainer, untimed
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close
from toys import GRID, LAYOUTS, PLANE, T, draw, method

import train
from ad import ADBatch, eq10_imitation_loss
from config import Play
from data import Prompt
from mixture import START, STD, Mixture, check_mixture, head_size, mixture
from models import ModelSettings
from support import checkpoint
from support.command_line import parse_config, preset_config
from support.settings import flat

near = partial(assert_close, atol=1e-5, rtol=1e-5)
FORK = str(Path(__file__).parent / "forks" / "bc.py")
# a head over 2 numbers: its logits are those of 0.5, 0.3 and 0.2
WEIGHTS, MEANS = (0.5, 0.3, 0.2), ((0.6, 0.6), (-0.6, 0.6), (0.0, -0.6))


def head_of(rows=1, std=0.08) -> torch.Tensor:
    """The numbers (rows, 15) of a head that says WEIGHTS, MEANS and this deviation."""
    place = (math.log(std) - math.log(STD[0])) / (math.log(STD[1]) - math.log(STD[0]))
    width = math.log(place / (1 - place)) - START
    parts = zip(WEIGHTS, MEANS, strict=True)
    numbers = [[math.log(w), *map(math.atanh, mean), width, width] for w, mean in parts]
    return torch.tensor(numbers).flatten().expand(rows, 15)


def which(actions) -> torch.Tensor:
    """The component whose mean is nearest."""
    return torch.cdist(actions, torch.tensor(MEANS)).argmin(-1)


def policy_of(layout="ad", components=3, **changes):
    tiny = method(layout, PLANE, components=components, **changes)
    return tiny.policy(tiny.cfg.play)


# ----------------------------------------------------------------------------------- the likelihood
@pytest.mark.parametrize("components, da", [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_likelihood_and_gradient_are_those_of_torch_distributions(components, da):
    torch.manual_seed(0)
    head = 2 * torch.randn(2, 5, components * (1 + 2 * da))
    action = torch.rand(2, 5, da) * 2 - 1
    action[0, 0], action[0, 1] = 1.0, -1.0  # at the bounds, as saturated teachers have them
    ours, theirs = (head.clone().requires_grad_() for _ in range(2))
    got = mixture(ours, da).log_prob(action)
    logit, mean, width = theirs.view(2, 5, components, -1).split((1, da, da), -1)
    low, high = math.log(STD[0]), math.log(STD[1])
    std = (low + (high - low) / (1 + (-width - START).exp())).exp()
    gaussians = Independent(Normal(mean.tanh(), std), 1)
    want = MixtureSameFamily(Categorical(logits=logit[..., 0]), gaussians).log_prob(action)
    near(got, want)
    for log_prob in (got, want):
        log_prob.mean().backward()
    near(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 0.01


def test_density_integrates_to_one():
    grid = torch.linspace(-3, 3, 401)
    points = torch.cartesian_prod(grid, grid)
    density = mixture(head_of(std=0.1), 2).log_prob(points[:, None]).exp()
    assert density.sum().item() * (6 / 400) ** 2 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("number", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_any_head_gives_a_distribution_and_finite_gradients(number):
    head = torch.full((4, 10), number)
    head[:, 5] = -number
    head.requires_grad_()
    policy = mixture(head, 2)
    assert policy.log_weight.exp().sum(-1).allclose(torch.ones(4))
    assert policy.mean.abs().max() <= 1
    assert policy.std.min() >= STD[0] * 0.999 and policy.std.max() <= STD[1] * 1.001
    loss = -policy.log_prob(torch.tensor([[1.0, -1.0], [0.0, 0.0], [-1.0, -1.0], [1.0, 1.0]]))
    loss.sum().backward()
    assert loss.isfinite().all() and head.grad.isfinite().all()


def test_eq10_of_a_mixture_is_nats_of_one_number_of_the_action():
    """The mean over rows and numbers; the same actions twice in a vector change nothing."""
    torch.manual_seed(0)
    head, target = torch.randn(2, 3, 15), torch.rand(2, 3, 2) * 2 - 1
    want = -mixture(head, 2).log_prob(target).sum() / 12
    near(eq10_imitation_loss(head, target, False), want)
    one, number = torch.randn(2, 3, 3), torch.rand(2, 3, 1)  # one component, one number
    twice = one[..., [0, 1, 1, 2, 2]]
    near(
        eq10_imitation_loss(twice, number.expand(2, 3, 2), False),
        eq10_imitation_loss(one, number, False),
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = eq10_imitation_loss(head.bfloat16(), target, False)
    assert got.dtype == torch.float32
    assert torch.equal(got, eq10_imitation_loss(head.bfloat16().float(), target, False))
    with pytest.raises(ValueError, match="14 numbers are no mixture over 2"):
        eq10_imitation_loss(head[..., :14], target, False)


# ------------------------------------------------------------------------------------------ drawing
def test_components_are_drawn_as_often_as_their_weights_say():
    n = 40_000
    u, noise = torch.rand(n), torch.randn(n, 2)
    drawn = mixture(head_of(n), 2).sample(u, noise)
    share = which(drawn).bincount(minlength=3) / n
    assert_close(share, torch.tensor(WEIGHTS), atol=0.012, rtol=0)
    for k in range(3):
        near(drawn[which(drawn) == k].std(0), torch.full((2,), 0.08), atol=0.005)
    still = mixture(head_of(n), 2).sample(u, 0 * noise)
    near(still, torch.tensor(MEANS)[which(drawn)])
    wide = mixture(head_of(n), 2).sample(u, 30 * noise)
    assert wide.abs().max() == 1


def test_the_number_u_is_looked_up_in_the_cumulative_weights():
    """Component k where u is in [w_1 + ... + w_{k-1}, w_1 + ... + w_k); never one of weight 0."""
    u = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999999])
    policy = mixture(head_of(6), 2)
    assert which(policy.sample(u, torch.zeros(6, 2))).tolist() == [0, 0, 1, 1, 2, 2]
    weight = torch.tensor([[0.0, 0.7, 0.2]])  # rounded down: the sum ends below u
    policy = Mixture(weight.log(), torch.tensor([MEANS]), torch.full((1, 3, 2), 0.1))
    for number, k in ((0.0, 1), (0.6, 1), (0.8, 2), (0.99, 2)):
        assert which(policy.sample(torch.tensor([number]), torch.zeros(1, 2))).item() == k


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_temperature_sharpens_or_flattens_the_weights(temperature):
    """w_k to the power of 1/T, normalised; means and deviations stay."""
    n = 40_000
    policy = policy_of(temperature=temperature)
    policy.begin([], n)
    actions = policy.action(head_of(n))
    power, drawn = torch.tensor(WEIGHTS) ** (1 / temperature), which(actions)
    assert_close(drawn.bincount(minlength=3) / n, power / power.sum(), atol=0.012, rtol=0)
    for k, mean in enumerate(MEANS):
        near(actions[drawn == k].mean(0), torch.tensor(mean), atol=0.01)
        near(actions[drawn == k].std(0), torch.full((2,), 0.08), atol=0.01)


@pytest.mark.parametrize("layout", ["ad", "last"])
def test_a_component_stays_for_an_episode_or_is_drawn_at_every_step(layout):
    rows, steps = 3000, 4
    for every in ("episode", "step"):
        policy = policy_of(layout, component_every=every)
        episodes = []
        for _ in range(2):
            policy.begin([], rows)
            actions = [policy.action(head_of(rows)) for _ in range(steps)]
            episodes.append(torch.stack([which(action) for action in actions]))
        shares = torch.stack([e[0].bincount(minlength=3) for e in episodes]) / rows
        assert_close(shares, torch.tensor([WEIGHTS] * 2), atol=0.04, rtol=0)
        together = sum(w * w for w in WEIGHTS)  # of two draws that know nothing of one another
        for episode in episodes:
            same = (episode == episode[0]).float().mean(1)
            assert (
                (same == 1).all()
                if every == "episode"
                else (same[1:] - together).abs().max() < 0.04
            )
            # the component stays; the action around its mean is drawn anew
            assert not torch.equal(actions[0], actions[1])
        again = (episodes[0][0] == episodes[1][0]).float().mean()
        assert abs(again - together) < 0.04  # another episode, another component


def test_greedy_spread_and_noise():
    """greedy: the likeliest component's mean. Two deviations beside one another add as squares."""
    n, std = 4000, 0.2
    head = head_of(n, std)

    def play(**settings):
        policy = policy_of(**settings)
        policy.begin([], n)
        return policy.action(head)

    likeliest = torch.tensor(MEANS[0]).expand(n, 2)
    near(play(actions="greedy"), likeliest)
    assert torch.equal(play(actions="search"), play(actions="sample"))  # nothing has been read
    near(play(actions="greedy", component_every="episode", spread=3.0), likeliest)
    assert (play(spread=0.0).unsqueeze(1) - torch.tensor(MEANS)).abs().sum(-1).amin(1).max() < 1e-5
    for settings, want in (
        ({"actions": "greedy", "noise": 0.1}, 0.1),
        ({"spread": 0.5}, 0.1),
        ({"spread": 0.5, "noise": 0.1}, 0.1 * 2**0.5),
    ):
        drawn = play(**settings)
        inner = drawn[which(drawn) == 0]
        assert inner.abs().max() <= 1
        # the median: some beyond the bound are clipped to it
        off = (inner - torch.tensor(MEANS[0]))[inner < 0.6].abs().median()
        assert off.item() == pytest.approx(0.6745 * want, rel=0.08)
    assert torch.equal(play(), play()) and not torch.equal(play(), play(play_seed=1))
    assert torch.equal(which(play(spread=0.0)), which(play(spread=0.1)))  # the same components


def test_a_first_episode_of_random_actions():
    policy = policy_of(first="random", component_every="episode")
    policy.begin([], 3000)
    actions = policy.action(head_of(3000))
    assert actions.shape == (3000, 2) and actions.abs().max() <= 1
    assert abs(actions.abs().mean() - 0.5) < 0.02 and abs(actions.mean()) < 0.03


# ---------------------------------------------------------------------------- networks and policies
def either_way(rows, steps, rng):
    """A batch of AD in which every action is (0.7, -0.7) or (-0.7, 0.7), half of them each."""
    sign = 2 * torch.randint(2, (rows, steps, 1), generator=rng) - 1
    actions = 0.7 * sign * torch.tensor([1.0, -1.0])
    states = torch.randn(rows, steps, 3, generator=rng)
    return ADBatch(Prompt(states, actions, torch.zeros(rows, steps)), torch.arange(rows) // 2)


def test_of_two_ways_the_squared_error_plays_the_mean_and_a_mixture_plays_one():
    rng = torch.Generator().manual_seed(1)

    def played(components):
        small = {"layers": 1, "moe": "none", "lr": 1e-2, "warmup": 1, "schedule": "constant"}
        tiny = method("ad", PLANE, components=components, **small)
        tiny.model.train()
        for _ in range(150):
            train.training_step(tiny, either_way(32, T, rng))
        policy = tiny.policy(replace(tiny.cfg.play, spread=1.0))
        policy.begin([], 1000)
        with torch.no_grad():
            return policy.act(torch.randn(1000, 3, generator=rng))

    ways = torch.tensor([[0.7, -0.7], [-0.7, 0.7]])
    mean, drawn = played(0), played(2)
    assert torch.cdist(mean, ways).min() > 0.7 and mean.abs().mean() < 0.15
    assert (torch.cdist(drawn, ways).amin(1) < 0.3).float().mean() > 0.97
    share = torch.cdist(drawn, ways).argmin(1).float().mean()
    assert abs(share - 0.5) < 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_grows_and_all_of_it_is_trained(layout):
    tiny = method(layout, PLANE, components=4)
    assert tiny.model.head.weight.shape == (20, 16) and head_size(PLANE, 4) == 20
    toys.stir(tiny.model).train()
    batch = draw(tiny.model, rows=4, queries=3 if layout == "last" else 1)
    terms, _ = tiny.losses(batch)
    output = tiny.model(batch).action
    sum(terms.values()).backward()
    assert (tiny.model.head.weight.grad.abs().amax(1) > 0).all() and output.shape[-1] == 20
    assert set(tiny.model.state_dict()) == set(method(layout, PLANE).model.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_components_nothing_is_drawn_and_nothing_has_changed(layout):
    tiny = method(layout, PLANE)
    assert tiny.cfg.model.components == 0 and tiny.model.head.weight.shape == (2, 16)
    policy, prediction = tiny.policy(tiny.cfg.play), torch.rand(5, 2) * 2 - 1
    before = policy.rng.get_state()
    policy.begin([], 5)
    assert torch.equal(policy.action(prediction), prediction)
    assert torch.equal(policy.rng.get_state(), before)
    output, target = tiny.model(draw(tiny.model)).action, torch.rand(2, 1, 2)
    assert output.abs().max() < 1 and output.shape[-1] == 2
    target = target.expand_as(output)
    mean = torch.nn.functional.mse_loss(output, target)
    assert torch.equal(eq10_imitation_loss(output, target, False), mean)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_play_is_what_the_full_pass_says(layout):
    """Greedily, as the squared error's play is tested: test_ad.py, test_dpt_plays.py."""
    tiny = toys.point_method(layout, components=3, actions="greedy")
    episode = toys.play_points(tiny, episodes=1)[0]
    if layout == "ad":
        head = tiny.model(ADBatch(toys.shown(episode), torch.arange(3))).action
    else:
        asked = toys.shown(episode).states.split(1, 1)
        head = torch.cat([tiny.model(toys.ask(toys.no_points(), q)).action for q in asked], 1)
    near(episode.actions, mixture(head, 2).likeliest())


@pytest.mark.parametrize("layout", ["first", "last"])
@torch.no_grad()
def test_dpt_keeps_its_answers_in_a_grid_of_continuous_actions(layout):
    """The mixture is kept, not the action: the same cell is played differently."""
    tiny = method(layout, replace(GRID, discrete_actions=False), components=2)
    policy, states = tiny.policy(tiny.cfg.play), torch.tensor([[0, 1], [3, 4]])
    policy.begin([], 2)
    first, second = policy.act(states), policy.act(states)
    assert policy.answers.shape == (2, 20, 2 * 7) and first.shape == (2, 3)
    assert not torch.equal(first, second) and policy.answers.isnan().any()


# ---------------------------------------------------------------------------------- settings, runs
@pytest.mark.parametrize(
    "argv, why",
    [
        (["--env", "darkroom", "--components", "3"], "--components is for continuous actions"),
        (["--env", "point-robot", "--components=-1"], "--components -1"),
        (["--env", "reach", "--spread", "0.5"], "--components"),
        (["--env", "reach", "--component-every", "episode"], "--components"),
        (["--env", "point-robot", "--components", "2", "--spread=-1"], "--spread -1"),
    ],
)
@pytest.mark.parametrize("backbone", ["ad", "dpt", FORK])
def test_settings_refuse(backbone, argv, why):
    """Whatever the method: bc.py names none of these settings."""
    with pytest.raises(ValueError, match=why) as error:
        parse_config(["--backbone", backbone, "--preset", "cpu", *argv])
    assert "\n" not in str(error.value)


def test_settings_that_fit():
    base = ["--env", "point-robot", "--preset", "cpu", "--components", "3"]
    cfg = parse_config([*base, "--component-every", "episode", "--spread", "0"])
    assert (cfg.model.components, cfg.play.component_every, cfg.play.spread) == (3, "episode", 0)
    for env in ("point-robot", "cheetah-vel"):  # the paper's head in the paper's preset
        assert flat(preset_config("paper", env, "ad"))["components"] == 0
    with pytest.raises(ValueError, match="continuous actions"):  # also where a network is made
        method("ad", GRID, components=2)
    with pytest.raises(ValueError, match="--components"):  # and where it is played
        policy_of(components=0, spread=2.0)
    check_mixture(object(), Play(), GRID)  # a network of the user's, without mixtures
    check_mixture(ModelSettings(components=2), Play(spread=0.1), PLANE)


MIXED = {"components": 3, "steps": 4, "prompt_length": 40, "checkpoint_every": 2}


@pytest.mark.parametrize("backbone", ["ad", "dpt", FORK])
def test_a_run_stops_continues_and_is_played(
    backbone, point_config, point_folder, tmp_path, monkeypatch, capsys
):
    step, done = train.training_step, []

    def stop_in_the_third(*arguments):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    with at_home(), trainer(point_config) as fit:
        whole = fit(tmp_path / "whole", backbone, **MIXED)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train, "training_step", stop_in_the_third)
            fit(tmp_path / "run", backbone, **MIXED)
        fit(tmp_path / "run", backbone, resume=True, **MIXED)
        assert differing(tmp_path / "run", whole) == []
        assert untimed(tmp_path / "run") == untimed(whole)
        other = command(point_config, whole, backbone, **MIXED | {"components": 2}, resume=True)
        assert "components 3 -> 2" in run("train.py", other, monkeypatch, capsys).error
        argv = [str(whole), "--backbone", backbone, "--component-every", "episode"]
        argv += ["--spread", "0.5", "--noise", "0.1", "--temperature", "0.5"]
        ended = run("evaluate.py", argv, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert list(whole.glob("test-sample-t0.5-each-episode-spread0.5-noise0.1*.csv"))


def test_a_run_older_than_the_settings_is_read_and_continued(
    point_config, point_folder, tmp_path, monkeypatch
):
    """What its config.json lacks is what it did; settings that it should have are still missed."""
    young = {"model": ["components"], "play": ["component_every", "spread"]}

    def older(content):
        for group, names in young.items():
            for name in names:
                del content["settings"][group][name]

    small = {"steps": 2, "prompt_length": 40}
    with at_home(), trainer(point_config) as fit:
        run_ = fit(tmp_path / "run", "ad", **small)
        want = checkpoint.load_config(run_)
        rewrite(run_ / "config.json", older)
        assert checkpoint.load_config(run_) == want
        fit(run_, "ad", resume=True, **small)
    rewrite(run_ / "config.json", lambda content: content["settings"]["play"].pop("noise"))
    with pytest.raises(ValueError, match="play settings"):
        checkpoint.load_config(run_)
