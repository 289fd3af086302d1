"""Dataset folders and the samplers of Algorithms 1 and 3 (paper Sec. 3.1, 4.3, App. A, D.2).

Run: pytest tests/test_data.py
"""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import envs
from data import (
    FORMAT,
    file_hash,
    load_dataset,
    load_part,
    normalise,
    read_meta,
    rows,
    sample_ad,
    sample_dpt,
    subset,
)
from families.rooms import darkroom_expert

N, E, T, Q = 8, 10, 100, 50  # of the tiny datasets


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def coded(paper_data):
    """The tiny dataset with readable contents: every state is (task, episode), query m is divmod(m, 10)."""
    task, episode = torch.meshgrid(torch.arange(N), torch.arange(E), indexing="ij")
    states = torch.stack([task, episode], -1)[:, :, None].expand(N, E, T, 2).to(torch.uint8)
    queries = (
        torch.stack([torch.arange(Q) // 10, torch.arange(Q) % 10], -1)
        .expand(N, Q, 2)
        .to(torch.uint8)
    )
    return replace(paper_data, states=states, query_states=queries)


def episodes_of(batch):
    """(task (B,), episodes (B, L)) of a batch of the coded dataset; checks that no episode is torn."""
    states = batch.prompt.states.unflatten(1, (-1, T))  # (B, L, T, 2)
    assert (states == states[:, :, :1]).all()
    task, episode = states[:, :, 0].unbind(-1)
    assert (task == batch.task[:, None]).all()  # all of one task
    return batch.task, episode


def check_contents(data, batch, task, episode):
    """Actions and rewards of a prompt are those that the dataset stores for (task, episode), in order."""
    for row, ids in enumerate(episode):
        for place, e in enumerate(ids):
            steps = slice(place * T, (place + 1) * T)
            assert torch.equal(batch.prompt.actions[row, steps], data.actions[task[row], e].long())
            assert torch.equal(batch.prompt.rewards[row, steps], data.rewards[task[row], e])


# --------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("recipe", ["paper", "explore"])
def test_loaded_arrays_are_the_stored_ones(recipe, request):
    folder, data = (request.getfixturevalue(f"{recipe}_{what}") for what in ("folder", "data"))
    assert (data.tasks, data.episodes, data.spec.name) == (N, E, "darkroom")
    assert (
        data.meta == json.loads((folder / "meta.json").read_text())
        and data.meta["recipe"] == recipe
    )
    shapes = {
        "states": (N, E, T, 2),
        "actions": (N, E, T),
        "rewards": (N, E, T),
        "query_states": (N, Q, 2),
        "query_actions": (N, Q),
    }
    for name, shape in shapes.items():
        assert getattr(data, name).shape == shape
        for i in range(N):
            with np.load(folder / f"task-{i:03d}.npz") as part:
                np.testing.assert_array_equal(getattr(data, name)[i], part[name])
    assert data.rewards.dtype == data.returns.dtype == torch.float32
    assert data.state_mean.tolist() == [0, 0] and data.state_std.tolist() == [
        1,
        1,
    ]  # grids stay as they are


def test_order_is_ascending_by_return_and_ties_keep_their_place(paper_data):
    returns = paper_data.rewards.sum(-1)
    assert torch.equal(paper_data.returns, returns)
    ties = 0
    for row, order in zip(returns.tolist(), paper_data.order.tolist(), strict=True):
        assert order == sorted(range(E), key=lambda e: row[e])  # Python's sort is stable
        ties += E - len(set(row))
    assert ties >= N  # every task ends with two optimal episodes


def test_subset_keeps_the_chosen_tasks(paper_data):
    few = subset(paper_data, slice(2, 5))
    assert few.tasks == 3 and few.episodes == E
    for name in (
        "states",
        "actions",
        "rewards",
        "query_states",
        "query_actions",
        "returns",
        "order",
    ):
        assert torch.equal(getattr(few, name), getattr(paper_data, name)[2:5])


# --------------------------------------------------------------------------------- AD (Algorithm 1)
def test_ad_prompts_are_whole_episodes_ascending_by_return(coded):
    batch = sample_ad(coded, batch=16, episodes=4, draws=2, rng=generator())
    assert batch.prompt.states.shape == (16, 4 * T, 2) and batch.prompt.steps == 4 * T
    assert batch.prompt.actions.shape == batch.prompt.rewards.shape == (16, 4 * T)
    assert (
        batch.prompt.states.dtype == batch.prompt.actions.dtype == batch.task.dtype == torch.int64
    )
    assert batch.prompt.rewards.dtype == torch.float32
    task, episode = episodes_of(batch)
    check_contents(coded, batch, task, episode)
    assert all(len(set(row)) == 4 for row in episode.tolist())  # different episodes
    returns = batch.prompt.rewards.unflatten(1, (4, T)).sum(-1)
    assert (returns.diff(dim=1) >= 0).all() and (returns.diff(dim=1) > 0).any()
    assert torch.equal(returns, coded.returns[task[:, None], episode])


@pytest.mark.parametrize("sample", [sample_ad, sample_dpt])
@pytest.mark.parametrize("draws", [1, 2, 4])
def test_each_task_of_a_batch_is_drawn_so_often(coded, sample, draws):
    seen = set()
    for seed in range(20):
        task, _episode = episodes_of(sample(coded, 4 * draws, 3, draws, generator(seed)))
        assert len(task) == 4 * draws
        assert task.unique(return_counts=True)[1].tolist() == [draws] * 4
        assert (task.view(4, draws) == task.view(4, draws)[:, :1]).all()  # draws stand side by side
        seen.update(task.tolist())
    assert seen == set(range(N))


@pytest.mark.parametrize("sample", [sample_ad, sample_dpt])
def test_batch_with_more_rows_than_tasks_begins_a_new_round(coded, sample):
    task, _ = episodes_of(sample(coded, 40, 2, 2, generator()))
    pairs = task.view(20, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    for part in (pairs[:8, 0], pairs[8:16, 0]):
        assert sorted(part.tolist()) == list(range(N))
    assert len(set(pairs[16:, 0].tolist())) == 4


def test_rows_cut_a_batch_and_its_prompt(coded):
    batch = sample_dpt(coded, 8, 1, 1, generator(), queries=3)
    few = rows(batch, slice(2, 5))
    assert type(few) is type(batch)
    for name in ("task", "query_states", "query_actions", "visible"):
        assert torch.equal(getattr(few, name), getattr(batch, name)[2:5])
    for name in ("states", "actions", "rewards"):
        assert torch.equal(getattr(few.prompt, name), getattr(batch.prompt, name)[2:5])


@pytest.mark.parametrize("sample", [sample_ad, sample_dpt])
def test_draws_of_a_task_are_independent_and_cover_all_episodes_evenly(coded, sample):
    rng, episodes = generator(), []
    for _ in range(200):
        episodes.append(episodes_of(sample(coded, 16, 4, 2, rng))[1])
    episodes = torch.cat(episodes)  # (3200, 4)
    assert all(len(set(row)) == 4 for row in episodes.tolist())
    share = episodes.flatten().bincount(minlength=E) / len(episodes)
    assert (share - 0.4).abs().max() < 5 * (0.4 * 0.6 / len(episodes)) ** 0.5
    first, second = (episodes[i::2].sort(1).values for i in (0, 1))
    same = (first == second).all(1).float().mean()  # one in 10 choose 4 = 210 by chance
    assert same < 0.02


@pytest.mark.parametrize("sample", [sample_ad, sample_dpt])
def test_a_generator_determines_the_batch(coded, sample):
    first, again, other = (sample(coded, 8, 3, 1, generator(seed)) for seed in (5, 5, 6))
    for name in ("states", "actions", "rewards"):
        assert torch.equal(getattr(first.prompt, name), getattr(again.prompt, name))
    assert torch.equal(first.task, again.task) and not torch.equal(
        first.prompt.states, other.prompt.states
    )
    if sample is sample_dpt:
        assert torch.equal(first.query_states, again.query_states)
        assert torch.equal(first.visible, again.visible)


# -------------------------------------------------------------------------------- DPT (Algorithm 3)
def test_dpt_batch_holds_stored_steps_and_queries(coded):
    batch = sample_dpt(coded, batch=16, episodes=2, draws=2, rng=generator(), queries=6)
    task, episode = episodes_of(batch)
    check_contents(coded, batch, task, episode)
    assert batch.query_states.shape == (16, 6, 2) and batch.query_states.dtype == torch.int64
    assert batch.query_actions.shape == batch.visible.shape == (16, 6)
    assert batch.query_actions.dtype == batch.visible.dtype == torch.int64
    pick = batch.query_states @ torch.tensor([10, 1])
    assert torch.equal(batch.query_actions, coded.query_actions[task[:, None], pick].long())


def test_dpt_queries_are_independent_of_the_prompt(coded):
    rng, pairs = generator(), []
    for _ in range(500):
        batch = sample_dpt(coded, batch=8, episodes=1, draws=1, rng=rng, queries=5)
        episode, pick = episodes_of(batch)[1], batch.query_states @ torch.tensor([10, 1])
        pairs.append((episode * Q + pick).flatten())
    table = torch.cat(pairs).bincount(minlength=E * Q).view(E, Q).double()
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    freedom = (E - 1) * (Q - 1)
    chi = ((table - expected) ** 2 / expected).sum()
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5  # neither linked nor suspiciously even
    assert (table.sum(0) / table.sum() - 1 / Q).abs().max() < 0.005  # every query equally often


@pytest.mark.parametrize("recipe", ["paper", "explore"])
def test_dpt_labels_of_mixed_data_are_the_expert_s(recipe, request):
    data = request.getfixturevalue(f"{recipe}_data")
    batch = sample_dpt(data, batch=8, episodes=1, draws=1, rng=generator(), queries=40)
    goals = np.array(data.meta["train_tasks"])[batch.task]
    labels = darkroom_expert(batch.query_states.numpy(), goals[:, None])
    np.testing.assert_array_equal(batch.query_actions, labels)
    assert len(np.unique(labels)) == 5


@pytest.mark.parametrize(
    ("short", "empty"), [(0.2, 0.3), (0.5, 0.0), (0.0, 0.4), (0.0, 0.0), (0.0, 1.0)]
)
def test_dpt_shares_of_hidden_prompts(coded, short, empty):
    batch = sample_dpt(coded, 8, 2, 1, generator(), queries=2000, short=short, empty=empty)
    visible, steps, whole = batch.visible.flatten(), 2 * T, 1 - empty - short
    assert visible.min() >= 0 and visible.max() <= steps
    within = 4 * 0.5 / len(visible) ** 0.5
    assert (visible == 0).double().mean() == pytest.approx(empty + short / (steps + 1), abs=within)
    for episodes in (1, 2):  # whole episodes, equally often
        share = (visible == episodes * T).double().mean()
        assert share == pytest.approx(whole / 2 + short / (steps + 1), abs=within)
    part = visible[visible % T != 0].double()
    assert len(part) / len(visible) == pytest.approx(short * (steps - 2) / (steps + 1), abs=within)
    if short:  # uniform between the ends
        assert part.mean() == pytest.approx(steps / 2, abs=4 * steps / 12**0.5 / len(part) ** 0.5)
        assert part.unique().numel() == steps - 2
    if not short and empty in (0, 1):  # exactly, not only on average
        assert (visible == 0).all() if empty else ((visible % T == 0) & (visible > 0)).all()


# ------------------------------------------------------------------------------------ damaged folders
@pytest.fixture
def folder(paper_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(paper_folder, tmp_path / "data")


def refused(folder, message, env=None):
    """load_dataset fails in one line and leaves every byte as it was."""
    before = (
        {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None
    )
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(folder, env)
    assert "\n" not in str(error.value)
    if before is None:
        assert not folder.exists()
    else:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def change_meta(folder, **changes):
    """Set entries of meta.json; None removes one."""
    meta = {**json.loads((folder / "meta.json").read_text()), **changes}
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


def sign(folder, task=3):
    """Put the hash of a part that was changed into meta.json, so that only its contents are at fault."""
    hashes = read_meta(folder)["sha256"]
    hashes[task] = file_hash(folder / f"task-{task:03d}.npz")
    change_meta(folder, sha256=hashes)


def rewrite(folder, **changes):
    """Replace arrays of part 3 (None drops one), with a valid hash."""
    path = folder / "task-003.npz"
    with np.load(path) as part:
        arrays = {**part, **changes}
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    sign(folder)


def changed(array, value):
    """The array with its last number replaced."""
    array = array.copy()
    array.flat[-1] = value
    return array


def test_rewritten_part_with_a_valid_hash_loads(folder):
    """The control of the tests below: what they refuse is the content, not the rewriting."""
    actions = load_dataset(folder).actions[3].numpy()
    rewrite(folder, actions=changed(actions, (actions.flat[-1] + 1) % 5))
    assert (load_dataset(folder).actions[3].numpy() != actions).sum() == 1


def test_missing_folder(tmp_path):
    refused(tmp_path / "nothing", "no dataset in .*nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no dataset in"),
        ("", "damaged"),
        ('{"format": 1,', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        ("[]", f"not a t2mir dataset of format {FORMAT}"),
        ("{}", f"not a t2mir dataset of format {FORMAT}"),
    ],
)
def test_missing_or_garbage_meta(folder, text, message):
    path = folder / "meta.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, message)


def test_other_format_number(folder):
    change_meta(folder, format=FORMAT + 1)
    refused(folder, f"format {FORMAT}")


def test_other_environment(folder):
    refused(folder, "holds data of 'darkroom', not of 'point-robot'", env="point-robot")
    change_meta(folder, env="atlantis")
    refused(folder, "unknown environment 'atlantis'")


@pytest.mark.parametrize("name", ["env", "episodes", "queries", "sha256", "train_tasks"])
def test_meta_that_lacks_an_entry(folder, name):
    change_meta(folder, **{name: None})
    refused(folder, f"{name}|meta.json")


def test_meta_with_too_few_hashes(folder):
    change_meta(folder, sha256=read_meta(folder)["sha256"][:5])
    refused(folder, "meta.json")


def test_missing_part(folder):
    (folder / "task-005.npz").unlink()
    refused(folder, "task-005.npz is missing")


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_flipped_byte_of_a_part(folder, place):
    path = folder / "task-002.npz"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    refused(folder, "task-002.npz is damaged")


def test_any_flipped_byte_of_a_part_without_a_known_checksum(folder):
    """As in a collection that was stopped: the archive's own checksums find it, or it is a time stamp's."""
    path, meta, named = folder / "task-003.npz", read_meta(folder), 0
    whole, spec = path.read_bytes(), envs.get_family("darkroom")
    want = load_part(folder, 3, meta, spec)
    places = range(0, len(whole), 7)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = load_part(folder, 3, meta | {"sha256": [file_hash(path)] * N}, spec)
            assert all((found[name] == want[name]).all() for name in want)
        except ValueError as error:
            assert "\n" not in str(error) and "task-003.npz is not a whole part" in str(error)
            named += 1
    assert named > len(places) / 2


@pytest.mark.parametrize("name", ["states", "actions", "rewards", "query_states", "query_actions"])
def test_wrong_shape(folder, name, paper_data):
    rewrite(folder, **{name: getattr(paper_data, name)[3].numpy()[1:]})
    refused(folder, f"task-003.npz: {name} has shape")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rewards_that_are_not_finite(folder, paper_data, value):
    rewrite(folder, rewards=changed(paper_data.rewards[3].numpy(), value))
    refused(folder, "task-003.npz: rewards holds values that are not finite")


@pytest.mark.parametrize(
    ("name", "value"),
    [("states", 10), ("actions", 5), ("actions", -1), ("query_states", -1), ("query_actions", 200)],
)
def test_ids_out_of_range(folder, paper_data, name, value):
    rewrite(folder, **{name: changed(getattr(paper_data, name)[3].numpy().astype(np.int16), value)})
    refused(folder, f"task-003.npz: {name} holds ids outside")


def test_part_that_lacks_an_array(folder):
    rewrite(folder, query_actions=None)
    refused(folder, "query_actions")


class Trap:
    """Unpickling one would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("whole", [False, True])
def test_pickles_are_never_opened(folder, tmp_path, whole):
    trap = Trap(tmp_path / "sprung")
    if whole:  # the part is a pickle, not an archive
        (folder / "task-003.npz").write_bytes(pickle.dumps(trap))
        sign(folder)
    else:
        rewrite(folder, rewards=np.array([trap], dtype=object))
    refused(folder, "pickle|task-003.npz")
    assert not trap.path.exists()


def test_part_that_is_no_archive(folder):
    (folder / "task-003.npz").write_bytes(b"PK\x03\x04 but no archive")
    sign(folder)
    refused(folder, "task-003.npz")


# ------------------------------------------------------------------------------- continuous families
def test_normalise():
    states = torch.randn(500, 3, generator=generator()) * torch.tensor([1.0, 10.0, 0.1]) + 7
    got = normalise(states, states.mean(0), states.std(0))
    torch.testing.assert_close(got.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(got.std(0), torch.ones(3), atol=1e-4, rtol=0)
    cells = torch.randint(10, (50, 2), generator=generator())
    assert torch.equal(normalise(cells, torch.full((2,), 3.0), torch.full((2,), 2.0)), cells)


@pytest.fixture
def continuous(tmp_path, monkeypatch):
    """A family with 3 continuous state numbers and 2 continuous action numbers: 2 tasks of 4 episodes."""
    spec = envs.Family(
        "slide", 25, 3, None, 2, False, 2, 1, task_numbers=1, gym_id="", expert="sac"
    )
    monkeypatch.setitem(envs.FAMILIES, "slide", spec)
    rng, hashes = np.random.default_rng(0), []
    for task in range(2):
        path = tmp_path / f"task-{task:03d}.npz"
        np.savez_compressed(
            path,
            states=(rng.normal(size=(4, 25, 3)) * [1, 10, 0.1] + [5, -3, task]).astype(np.float32),
            actions=rng.uniform(-1, 1, (4, 25, 2)).astype(np.float32),
            rewards=-rng.random((4, 25)).astype(np.float32),
            query_states=rng.normal(size=(6, 3)).astype(np.float32),
            query_actions=rng.uniform(-1, 1, (6, 2)).astype(np.float32),
        )
        hashes.append(file_hash(path))
    meta = {"format": FORMAT, "env": "slide", "episodes": 4, "queries": 6, "train_tasks": [0, 1]}
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "sha256": hashes}))
    return load_dataset(tmp_path, "slide")


def test_continuous_states_are_normalised_over_all_training_tasks(continuous):
    batch = sample_ad(continuous, batch=2, episodes=4, draws=1, rng=generator())  # every state once
    states = batch.prompt.states.flatten(0, 1)
    torch.testing.assert_close(states.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.std(0), torch.ones(3), atol=1e-4, rtol=0)
    assert (batch.prompt.rewards.unflatten(1, (4, 25)).sum(-1).diff(dim=1) > 0).all()
    assert states.dtype == torch.float32


def test_continuous_actions_and_queries_keep_their_axis(continuous):
    batch = sample_dpt(continuous, batch=2, episodes=1, draws=1, rng=generator(), queries=7)
    assert batch.prompt.actions.shape == (2, 25, 2) and batch.query_actions.shape == (2, 7, 2)
    assert batch.prompt.actions.dtype == batch.query_actions.dtype == torch.float32
    stored = (
        continuous.query_states[batch.task] - continuous.state_mean
    ) / continuous.state_std  # (2, 6, 3)
    match = (batch.query_states[:, :, None] == stored[:, None]).all(-1)  # (2, 7, 6)
    assert (match.sum(-1) == 1).all()  # normalised like the prompt
    labels = continuous.query_actions[batch.task[:, None], match.long().argmax(-1)]
    assert torch.equal(batch.query_actions, labels)
