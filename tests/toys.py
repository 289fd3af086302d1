"""toys.py: tiny families, methods, batches, datasets and games; nothing is collected.

A *layout* says which tokens there are: "ad" (Eq. 9), or DPT with its query "first" or "last".
"""

from dataclasses import replace
from itertools import product

import numpy as np
import torch

from ad import ADBatch, ADModel
from config import Config
from data import FORMAT, Dataset, Prompt, file_hash, part_name
from dpt import DPTBatch
from envs import Family, get_family
from evaluate import play
from families.darkroom import BatchedDarkRoom
from methods import Method, get_method
from models import T2MIR
from moe import H_BAR
from support.files import save_json
from support.settings import flat, groups_of, with_values

T, N, A = 3, 6, 3  # steps of an episode, of a prompt (two episodes); actions
LAYOUTS = ("ad", "first", "last")
BACKBONES = {"ad": "ad", "first": "dpt", "last": "dpt"}

# What decides who sees whom: (moe, routing), and the place of the experts.
PLACES = ("top", "middle", "bottom")
GATES = [*product(("none", "token", "task", "both"), H_BAR)]  # every rule that moe.py has
EQ4 = [(moe, "sequence") for moe in ("task", "both")]  # a gate of the whole row: it looks ahead
CAUSAL = [gate for gate in GATES if gate not in EQ4]  # the past alone makes a prediction
DECODABLE = [*product(CAUSAL, PLACES), *product(EQ4, ("top",))]


def unplayed(*_):
    raise AssertionError("this family is not played")


_FACTS = {"train_tasks": 2, "test_tasks": 1, "task_low": (0.0,), "task_high": (1.0,)}
_FACTS |= {"batch": unplayed, "sample_tasks": unplayed, "teacher": "ppo"}
# 4 x 5 cells; and states and actions that are continuous
GRID = Family("toy-grid", T, 2, A, **_FACTS, state_values=(4, 5), discrete_actions=True)
PLANE = Family("toy-plane", T, 3, 2, **_FACTS)
SLIDE = replace(PLANE, name="slide", horizon=25)  # `toys:SLIDE` in envs.FAMILIES

SMALL = {
    "layers": 4, "heads": 2, "width": 16, "ff": 24, "dropout": 0.0, "token_experts": 4,
    "token_hidden": 32, "task_experts": 5, "task_hidden": 40, "w_importance": 0.1, "w_load": 0.1,
    "prompt_length": N, "batch": 4, "lr": 1e-3, "device": "cpu",
}  # fmt: skip


# ----------------------------------------------------------------------------- methods and networks
def config(layout="ad", **changes) -> Config:
    """Settings of a tiny method, changed by their flat names."""
    groups = groups_of(get_method(BACKBONES[layout]))
    cfg = Config(backbone=BACKBONES[layout], **{name: group() for name, group in groups.items()})
    place = {} if layout == "ad" else {"query_position": layout}
    values = SMALL | place | changes
    assert values.keys() <= flat(cfg).keys(), values.keys() - flat(cfg).keys()
    return with_values(cfg, values)


def method(layout="ad", family=GRID, **changes) -> Method:
    """A tiny method with its first weights."""
    torch.manual_seed(0)
    return get_method(BACKBONES[layout])(config(layout, **changes), family)


def stir(model: T2MIR, std=0.1) -> T2MIR:
    """Random weights also where they start at zero; attention so strong that what is seen shows."""
    for name, parameter in model.named_parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=std)
        if name.endswith("qkv.weight"):
            parameter.data *= 2
    return model.eval()


def build(layout="ad", family=GRID, **changes) -> T2MIR:
    """A tiny network, stirred, in eval mode."""
    return stir(method(layout, family, **changes).model)


def gated(gate, place="top") -> dict[str, str]:
    """The settings of a (moe, routing) at a place."""
    return {"moe": gate[0], "routing": gate[1], "moe_position": place}


# ------------------------------------------------------------------------------------------ batches
def draw(model: T2MIR, rows=2, steps=N, queries=1) -> ADBatch | DPTBatch:
    """A batch of random numbers; every two rows share a task, all queries see all steps."""
    g, family = torch.Generator().manual_seed(0), model.family

    def states(n):
        if family.state_values is None:
            return torch.randn(rows, n, family.state_dim, generator=g)
        columns = [torch.randint(size, (rows, n), generator=g) for size in family.state_values]
        return torch.stack(columns, -1)

    def actions(n):
        if family.discrete_actions:
            return torch.randint(family.action_dim, (rows, n), generator=g)
        return torch.rand(rows, n, family.action_dim, generator=g) * 1.6 - 0.8

    prompt = Prompt(states(steps), actions(steps), torch.randn(rows, steps, generator=g))
    task = torch.arange(rows) // 2
    if isinstance(model, ADModel):
        return ADBatch(prompt, task)
    visible = torch.full((rows, queries), steps)
    return DPTBatch(prompt, task, states(queries), actions(queries), visible)


@torch.no_grad()
def changes_by_token(model: T2MIR, batch: ADBatch | DPTBatch) -> torch.Tensor:
    """Which prediction a change of one token of the prompt changes, (3n, R) bool; of row 0."""
    n, family = 3 * batch.prompt.steps, model.family
    names = ("states", "actions", "rewards")
    wide = {k: getattr(batch.prompt, k)[:1].repeat_interleave(n + 1, 0) for k in names}
    sizes = {"states": torch.tensor(family.state_values or 1), "actions": family.action_dim}
    for i in range(n):  # row i differs in token i, the last in none
        token = wide[names[i % 3]]
        new = token[i, i // 3] + 1
        token[i, i // 3] = new if token.is_floating_point() else new % sizes[names[i % 3]]
    parts = {"prompt": Prompt(**wide), "task": torch.arange(n + 1)}
    if isinstance(batch, DPTBatch):
        for k in ("query_states", "visible"):
            parts[k] = getattr(batch, k)[:1].repeat_interleave(n + 1, 0)
    action = model(replace(batch, **parts)).action
    return (action[:-1] - action[-1]).abs().amax(-1) > 1e-5


def ask(prompt: Prompt, states: torch.Tensor) -> DPTBatch:
    """Queries (B, Q, ds) without labels or tasks; they see all of the prompt."""
    size = states.shape[:2]
    return DPTBatch(prompt, None, states, torch.zeros(size).long(), torch.full(size, prompt.steps))


def cut(prompt: Prompt, end: int, start: int = 0) -> Prompt:
    """Steps `start` to `end` of a prompt."""
    columns = (prompt.states, prompt.actions, prompt.rewards)
    return Prompt(*(x[:, start:end] for x in columns))


# ----------------------------------------------------------------------------------------- datasets
def coded_dataset(tasks=8, episodes=10, queries=50) -> Dataset:
    """A DarkRoom dataset with readable contents: every state of an episode is (task, episode), the
    state of query m is divmod(m, 10). Actions, rewards and labels are random.
    """
    family, g = get_family("darkroom"), torch.Generator().manual_seed(0)
    size = (tasks, episodes, family.horizon)
    task, episode = torch.meshgrid(torch.arange(tasks), torch.arange(episodes), indexing="ij")
    states = torch.stack([task, episode], -1)[:, :, None].expand(*size, 2)
    number = torch.arange(queries)
    query_states = torch.stack([number // 10, number % 10], -1).expand(tasks, queries, 2)
    rewards = (torch.rand(size, generator=g) < torch.rand(tasks, episodes, 1, generator=g)).float()
    returns = rewards.sum(-1)
    return Dataset(
        family=family,
        meta={},
        states=states.byte(),
        actions=torch.randint(5, size, generator=g).byte(),
        rewards=rewards,
        query_states=query_states.byte(),
        query_actions=torch.randint(5, (tasks, queries), generator=g).byte(),
        returns=returns,
        order=returns.argsort(dim=1, stable=True),
        state_mean=torch.zeros(2),
        state_std=torch.ones(2),
    )


def episodes_of(batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(task (B,), episodes (B, L)) of a batch of the coded dataset; checks that none is torn."""
    states = batch.prompt.states.unflatten(1, (-1, 100))  # (B, L, T, 2)
    assert (states == states[:, :, :1]).all()
    task, episode = states[:, :, 0].unbind(-1)
    assert (task == batch.task[:, None]).all()  # all of one task
    return batch.task, episode


def check_contents(data: Dataset, batch, task, episode) -> None:
    """Actions and rewards of a prompt are those stored for (task, episode), in order."""
    for row, ids in enumerate(episode):
        for place, e in enumerate(ids):
            steps = slice(place * 100, (place + 1) * 100)
            assert torch.equal(batch.prompt.actions[row, steps], data.actions[task[row], e].long())
            assert torch.equal(batch.prompt.rewards[row, steps], data.rewards[task[row], e])


def write_continuous(folder, env: str, family: Family, tasks=2, episodes=4, queries=6) -> None:
    """A dataset folder of random numbers, states of very different scales."""
    rng, hashes, steps = np.random.default_rng(0), [], family.horizon
    ds, da = family.state_dim, family.action_dim
    scale = np.resize([1, 10, 0.1], ds)
    for task in range(tasks):
        path = folder / part_name(task)
        arrays = {
            "states": rng.normal(size=(episodes, steps, ds)) * scale + np.resize([5, -3, task], ds),
            "actions": rng.uniform(-1, 1, (episodes, steps, da)),
            "rewards": -rng.random((episodes, steps)),
            "query_states": rng.normal(size=(queries, ds)),
            "query_actions": rng.uniform(-1, 1, (queries, da)),
        }
        np.savez_compressed(path, **{k: v.astype(np.float32) for k, v in arrays.items()})
        hashes.append(file_hash(path))
    meta = {"format": FORMAT, "env": env, "data_episodes": episodes, "data_queries": queries}
    trained = [[0.1 * task] * family.task_numbers for task in range(tasks)]
    held_out = [[0.9] * family.task_numbers]
    meta |= {"train_tasks": trained, "test_tasks": held_out, "sha256": hashes}
    save_json(folder / "meta.json", meta)


# -------------------------------------------------------------------------------------------- games
ROOM = replace(get_family("darkroom"), horizon=10)
STARTS = np.array([[x, y] for x in (1, 4, 8) for y in (2, 5, 7)])
GOALS = STARTS + [[1, 0], [-1, 0], [0, 1]] * 3  # one step away: even a random model meets some


def play_room(tiny: Method):
    """Four short episodes of the DarkRoom: policy, predictions and the episodes."""
    model = stir(tiny.model)
    # no favourite action
    model.head.bias.data -= model(draw(model, rows=8, steps=10)).action.mean((0, 1))
    room, policy = BatchedDarkRoom(GOALS), tiny.policy(tiny.cfg.play)
    history, predictions, choose = [], [], policy.action
    policy.action = lambda logits: (predictions.append(logits.clone()), choose(logits))[1]
    for _ in range(4):
        policy.begin(history, len(GOALS))
        room.cells, states, steps = STARTS, torch.from_numpy(STARTS), []
        for _ in range(ROOM.horizon):
            actions = policy.act(states)
            following, rewards = map(torch.from_numpy, room.step(actions.numpy()))
            policy.observe(states, actions, rewards)
            steps.append((states, actions, rewards))
            states = following
        history.append(Prompt(*(torch.stack(column, 1) for column in zip(*steps, strict=True))))
    assert len(torch.cat([p.actions for p in history]).unique()) > 2
    assert not torch.equal(history[0].actions, history[-1].actions)
    assert sum(p.rewards.sum() for p in history) > 0
    return policy, predictions, history


POINT_ROBOT = get_family("point-robot")
MEAN, STD = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0])
POINTS = [[0.5, -0.5], [-1.0, 0.2], [0.05, 0.9]]


def point_method(layout: str, **changes) -> Method:
    """A tiny method for Point-Robot that normalises by MEAN and STD."""
    tiny = method(layout, POINT_ROBOT, layers=2, routing="prefix", token_shift=True, **changes)
    tiny.state_mean, tiny.state_std = MEAN, STD
    stir(tiny.model, std=0.3)
    return tiny


def play_points(tiny: Method, episodes=4) -> list[Prompt]:
    """The episodes that its policy plays."""
    policy, seen = tiny.policy(tiny.cfg.play), []
    begin = policy.begin
    policy.begin = lambda history, rows: (seen.append(history), begin(history, rows))[1]
    play("point-robot", POINTS, policy, episodes)
    return seen[0]  # the list that grows


def shown(prompt: Prompt) -> Prompt:
    """A prompt of Point-Robot as a model reads it."""
    return Prompt((prompt.states - MEAN) / STD, prompt.actions, prompt.rewards)


def no_points() -> Prompt:
    """The empty prompt of a first episode on Point-Robot."""
    return Prompt(torch.zeros(3, 0, 2), torch.zeros(3, 0, 2), torch.zeros(3, 0))


def check_point_actions(episodes: list[Prompt], want: list[torch.Tensor], first: str) -> None:
    """They are those wanted; in a first episode of random actions, they are not."""
    for e, episode in enumerate(episodes):
        if e or first == "policy":
            torch.testing.assert_close(episode.actions, want[e], atol=1e-5, rtol=0)
        else:
            assert (episode.actions - want[e]).abs().mean() > 0.1
            assert episode.actions.abs().max() <= 1
            assert abs(episode.actions.abs().mean() - 0.5) < 0.13
            assert abs(episode.actions.mean()) < 0.26
    later = torch.cat([episode.actions for episode in episodes[1:]], 1)
    assert later.abs().max() <= 1 and (later.std(1) > 1e-3).all()  # they differ from step to step
