"""test_data.py: dataset folders, and what the samplers of Algorithms 1 and 3 share (Sec. 3.1, D.2).

What a folder holds is what is loaded, and no damaged one is; draws of tasks and episodes by their
frequencies. What is AD's or DPT's alone: test_ad.py, test_dpt.py.
Run: python -m pytest -q tests/test_data.py
"""

import pickle
import shutil

import commands
import numpy as np
import pytest
import torch
from commands import Trap
from toys import SLIDE, coded_dataset, episodes_of, write_continuous

import envs
from ad import sample_ad
from data import FORMAT, file_hash, load_dataset, load_part, normalise, read_meta, rows
from dpt import DPTSettings, sample_dpt
from families.darkroom import darkroom_teacher

N, E, T, Q = 8, 10, 100, 50  # of the tiny datasets


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample_queries(data, rows, episodes, draws, rng, **settings):
    return sample_dpt(data, rows, episodes, draws, rng, DPTSettings(**settings))


@pytest.fixture(scope="module")
def coded():
    return coded_dataset(N, E, Q)


SAMPLERS = pytest.mark.parametrize("sample", [sample_ad, sample_queries])


# --------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("recipe", ["paper", "explore"])
def test_loaded_arrays_are_the_stored_ones(recipe, request):
    folder, data = (request.getfixturevalue(f"{recipe}_{what}") for what in ("folder", "data"))
    assert (data.tasks, data.episodes, data.family.name) == (N, E, "darkroom")
    assert data.meta == read_meta(folder) and data.meta["recipe"] == recipe
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


# ------------------------------------------------------------------------------ Algorithms 1 and 3
@SAMPLERS
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


@SAMPLERS
def test_batch_with_more_rows_than_tasks_begins_a_new_round(coded, sample):
    task, _ = episodes_of(sample(coded, 40, 2, 2, generator()))
    pairs = task.view(20, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    for part in (pairs[:8, 0], pairs[8:16, 0]):
        assert sorted(part.tolist()) == list(range(N))
    assert len(set(pairs[16:, 0].tolist())) == 4


def test_rows_cut_a_batch_and_its_prompt(coded):
    batch = sample_queries(coded, 8, 1, 1, generator(), queries=3)
    few = rows(batch, slice(2, 5))
    assert type(few) is type(batch)
    for name in ("task", "query_states", "query_actions", "visible"):
        assert torch.equal(getattr(few, name), getattr(batch, name)[2:5])
    for name in ("states", "actions", "rewards"):
        assert torch.equal(getattr(few.prompt, name), getattr(batch.prompt, name)[2:5])


@SAMPLERS
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


@SAMPLERS
def test_a_generator_determines_the_batch(coded, sample):
    first, again, other = (sample(coded, 8, 3, 1, generator(seed)) for seed in (5, 5, 6))
    for name in ("states", "actions", "rewards"):
        assert torch.equal(getattr(first.prompt, name), getattr(again.prompt, name))
    assert torch.equal(first.task, again.task) and not torch.equal(
        first.prompt.states, other.prompt.states
    )
    if sample is sample_queries:
        assert torch.equal(first.query_states, again.query_states)
        assert torch.equal(first.visible, again.visible)


@pytest.mark.parametrize("recipe", ["paper", "explore"])
def test_dpt_labels_of_mixed_data_are_the_teachers(recipe, request):
    data = request.getfixturevalue(f"{recipe}_data")
    batch = sample_queries(data, 8, 1, 1, generator(), queries=40)
    goals = np.array(data.meta["train_tasks"])[batch.task]
    labels = darkroom_teacher(batch.query_states.numpy(), goals[:, None])
    np.testing.assert_array_equal(batch.query_actions, labels)
    assert len(np.unique(labels)) == 5


# ---------------------------------------------------------------------------------- damaged folders
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

    def edited(meta):
        meta.update(changes)
        for name in [name for name, value in meta.items() if value is None]:
            del meta[name]

    commands.rewrite(folder / "meta.json", edited)


def sign(folder, task=3):
    """Put a changed part's hash into meta.json, so that only its contents are at fault."""
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


@pytest.mark.parametrize("name", ["env", "data_episodes", "data_queries", "sha256", "train_tasks"])
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
    """As in a stopped collection: the archive's own checksums find it, or it is a time stamp's."""
    path, meta, named = folder / "task-003.npz", read_meta(folder), 0
    whole, family = path.read_bytes(), envs.get_family("darkroom")
    want = load_part(folder, 3, meta, family)
    places = range(0, len(whole), 7)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = load_part(folder, 3, meta | {"sha256": [file_hash(path)] * N}, family)
            assert all((found[name] == want[name]).all() for name in want)
        except ValueError as error:
            assert "\n" not in str(error) and "task-003.npz is not a whole file" in str(error)
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


# ------------------------------------------------------------------------------ continuous families
def test_normalise():
    states = torch.randn(500, 3, generator=generator()) * torch.tensor([1.0, 10.0, 0.1]) + 7
    got = normalise(states, states.mean(0), states.std(0))
    torch.testing.assert_close(got.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(got.std(0), torch.ones(3), atol=1e-4, rtol=0)
    far = normalise(torch.tensor([[7.0, 0.0], [-40.0, 1.0]]), torch.ones(2), torch.full((2,), 0.1))
    assert far.tolist() == [[10, -10], [-10, 0]]  # a number that hardly ever moves


@pytest.fixture
def continuous(tmp_path, monkeypatch):
    """Three state and two action numbers, continuous: 2 tasks of 4 episodes of 25 steps."""
    monkeypatch.setitem(envs.FAMILIES, "slide", "toys:SLIDE")
    write_continuous(tmp_path, "slide", SLIDE)
    return load_dataset(tmp_path, "slide")


def test_continuous_states_are_normalised_over_all_training_tasks(continuous):
    batch = sample_ad(continuous, 2, 4, 1, generator())  # every state once
    states = batch.prompt.states.flatten(0, 1)
    torch.testing.assert_close(states.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.std(0), torch.ones(3), atol=1e-4, rtol=0)
    assert (batch.prompt.rewards.unflatten(1, (4, 25)).sum(-1).diff(dim=1) > 0).all()
    assert states.dtype == torch.float32


def test_continuous_actions_and_queries_keep_their_axis(continuous):
    batch = sample_queries(continuous, 2, 1, 1, generator(), queries=7)
    assert batch.prompt.actions.shape == (2, 25, 2) and batch.query_actions.shape == (2, 7, 2)
    assert batch.prompt.actions.dtype == batch.query_actions.dtype == torch.float32
    stored = (
        continuous.query_states[batch.task] - continuous.state_mean
    ) / continuous.state_std  # (2, 6, 3)
    match = (batch.query_states[:, :, None] == stored[:, None]).all(-1)  # (2, 7, 6)
    assert (match.sum(-1) == 1).all()  # normalised like the prompt
    labels = continuous.query_actions[batch.task[:, None], match.long().argmax(-1)]
    assert torch.equal(batch.query_actions, labels)
