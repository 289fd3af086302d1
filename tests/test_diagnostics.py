"""test_diagnostics.py: what diagnostics.py measures (Sec. 5.4, Fig. 1; App. C), and that looking
changes nothing.

Run: python -m pytest -q tests/test_diagnostics.py
"""

import math
from types import SimpleNamespace

import pytest
import torch
from toys import GRID, LAYOUTS, build, coded_dataset, draw, method

from diagnostics import divergence, loads, modality_counts, mutual_information, probe, routing
from envs import get_family

ROUTING = {"token_mi", "contrastive_fresh", "accuracy_fresh", "chance"}
ROUTING |= {f"{which}_{name}" for which in ("token", "task") for name in ("least", "entropy")}
ROUTING |= {f"token_load_{i}" for i in range(1, 5)} | {f"task_load_{i}" for i in range(1, 6)}


@pytest.mark.parametrize(
    ("joint", "bits"),
    [
        ([[1, 2], [2, 4]], 0.0),  # independent
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], math.log2(3)),  # one tells the other
        # H(X) + H(Y) - H(X, Y)
        ([[1, 1], [0, 2]], 1 + 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3) - 1.5),
        ([[3, 0], [0, 0]], 0.0),  # nothing varies
    ],
)
def test_mutual_information(joint, bits):
    assert mutual_information(torch.tensor(joint)) == pytest.approx(bits, abs=1e-6)


def test_loads_by_hand():
    kept = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]])  # 4, 3 and 1 choices of 8
    bits = 0.5 * 1 + 0.375 * math.log2(8 / 3) + 0.125 * 3
    want = {"token_load_1": 0.5, "token_load_2": 0.375, "token_load_3": 0.125}
    want |= {"token_least": 0.125, "token_entropy": bits}
    assert loads("token", kept, 3) == pytest.approx(want)
    want |= {"token_load_4": 0, "token_least": 0}  # an expert that nobody keeps
    assert loads("token", kept, 4) == pytest.approx(want)
    one_each = loads("task", torch.arange(8).repeat(3), 8)
    assert one_each["task_entropy"] == pytest.approx(3) and one_each["task_least"] == 1 / 8


def test_modality_counts_take_the_best_expert_and_leave_queries_out():
    token_expert = torch.tensor(
        [[[0, 1], [1, 3], [2, 3], [0, 1], [3, 0]], [[0, 2], [1, 0], [1, 2], [3, 2], [3, 1]]]
    )
    counts = modality_counts(token_expert, torch.tensor([0, 1, 2, 0, 3]), 4)
    assert counts.tolist() == [[3, 0, 0, 1], [0, 2, 0, 0], [0, 1, 1, 0]]


@pytest.mark.parametrize("moe", ["both", "token", "task", "none"])
def test_routing_are_numbers_of_the_experts_that_there_are(moe):
    model = build(moe=moe)
    output, want = model(draw(model, rows=8)), {}
    layer = output.moe
    if moe in ("both", "token"):
        counts = modality_counts(layer.token_expert, output.modality, 4)
        want["token_mi"] = mutual_information(counts)
        want |= loads("token", layer.token_expert, 4)
    if moe in ("both", "task"):
        want |= loads("task", layer.task_expert, 5)
        want["contrastive_fresh"] = layer.metrics["info_nce"].item()
        want["accuracy_fresh"] = layer.metrics["accuracy"].item()
        want["chance"] = 1 / 7
    assert routing(output, model.cfg, 8) == want


@pytest.mark.parametrize(("keys", "chance"), [("all", 1 / 7), ("other", 1 / 4)])
def test_chance_is_one_over_the_keys_of_a_query(keys, chance):
    model = build(keys=keys)
    output = model(draw(model, rows=8))  # two draws of each of four tasks
    assert routing(output, model.cfg, 8)["chance"] == chance


def test_divergence_with_and_without_a_reward():
    kl = torch.tensor([[1.0, 3.0], [5.0, 5.0], [0.5, 0.5]])
    family = SimpleNamespace(divergence=lambda *_: (kl, rewarded))
    prompt = draw(build()).prompt
    rewarded = torch.tensor([False, True, False])
    numbers = divergence(family, prompt, torch.zeros(3, 2, 2), torch.zeros(3, 2, 5))
    assert numbers == {"kl_reward": 5.0, "kl_no_reward": 1.25}
    rewarded[:] = True
    numbers = divergence(family, prompt, torch.zeros(3, 2, 2), torch.zeros(3, 2, 5))
    assert numbers["kl_reward"] == 2.5 and math.isnan(numbers["kl_no_reward"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moe", ["both", "none"])
def test_probe_looks_without_changing_anything(layout, moe):
    data = coded_dataset()
    data.rewards[:, : data.episodes // 2] = 0  # prompts with and without a reward
    tiny = method(layout, get_family("darkroom"), layers=2, moe=moe, prompt_length=100)
    tiny.model.eval()
    weights = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    state = torch.get_rng_state()
    for training in (True, False):
        tiny.model.train(training)
        numbers = probe(tiny, data, 1)
        assert all(module.training is training for module in tiny.model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in tiny.model.state_dict().items())
    want = ROUTING if moe == "both" else set()
    if layout != "ad":  # the exact posterior of the DarkRoom is known
        want = want | {"kl_reward", "kl_no_reward"}
    assert set(numbers) == want and all(math.isfinite(value) for value in numbers.values())
    if moe == "both":
        assert 0 <= numbers["token_mi"] <= math.log2(3) and 0 <= numbers["token_least"] <= 1 / 4
        for which in ("token", "task"):
            each = [numbers[name] for name in numbers if name.startswith(f"{which}_load")]
            assert sum(each) == pytest.approx(1) and min(each) == numbers[f"{which}_least"]
        # two draws of each of eight tasks
        assert numbers["chance"] == 1 / 15 and 0 <= numbers["accuracy_fresh"] <= 1
    if want:
        assert probe(tiny, data, 1) == numbers != probe(tiny, data, 2)


def test_probe_knows_no_divergence_where_no_posterior_is_known():
    data = coded_dataset()
    data.family = GRID
    tiny = method("first", GRID, prompt_length=3)
    data.states, data.query_states = data.states % 4, data.query_states % 4
    data.states, data.actions = data.states[:, :, :3], data.actions[:, :, :3] % 3
    data.rewards, data.query_actions = data.rewards[:, :, :3], data.query_actions % 3
    assert set(probe(tiny, data, 1)) == ROUTING
