"""measuring.py: what bench.py and growth.py measure with: clocks, memory, networks and data.

in : work to be done, or the sizes of something          out: seconds, operations, GB; the thing
Read after bench.py. Networks are untrained and data without a meaning: the speed does not depend
on what they say.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data import Dataset, Prompt
from envs import Family, get_family
from methods import Method, get_method
from support.command_line import preset_config
from support.settings import with_values


# ------------------------------------------------------------------------------- how it is measured
def seconds_of(work: Callable[[], object], at_least: float = 5.0) -> float:
    """Median seconds of a call, repeated for `at_least` seconds after a first one to warm up."""
    threads = torch.get_num_threads()  # the timer would take one otherwise
    timer = Timer("work()", globals={"work": work}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=at_least).median


def ceiling() -> float:
    """The machine's float32 matrix-product rate, in operations a second."""
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / seconds_of(lambda: a @ b, at_least=2.0)


# torch's counter does not know attention on the CPU. Where a token does not see those behind it the
# kernel leaves them out, which halves the count.
def _attention(query, key, value, dropout=0.0, causal=False, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value) // (2 if causal else 1)


def _attention_backward(
    grad, query, key, value, out, log_sum, dropout, causal=False, *_, out_shape=None, **__
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value) // (2 if causal else 1)


def operations_of(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of a call, as torch counts them.

    A count by hand (weights, and attention's causal half; three times the forward pass) gives 1-5 %
    less for DPT and Point-Robot, and 8 % less for AD on Cheetah-Vel: it leaves out the scores that
    attention's backward pass makes anew, heads and routers. AD on DarkRoom counts 84 % more here,
    since its heads of 8 numbers are padded to 16 with zeros, which are multiplied as well.
    """
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        work()
    return counter.get_total_flops()


def peak_gb() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def in_own_process(work: Callable[..., Any], *args) -> Any:
    """What `work` returns in a process made for it, whose peak of memory is then its own."""
    # spawned: a fork would begin with all that this process holds
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


# ----------------------------------------------------------------------------------- networks, data
def make_method(env: str, backbone: str, preset: str = "paper", **changes) -> Method:
    """A preset's method with some settings changed, untrained. Raises ValueError for no such."""
    cfg = with_values(preset_config(preset, env, backbone), changes)
    return get_method(backbone)(cfg, get_family(env))


def random_states(family: Family, *shape: int) -> Tensor:
    """(..., ds) int64 cells or float32"""
    if family.state_values:
        return torch.stack([torch.randint(size, shape) for size in family.state_values], -1)
    return torch.randn(*shape, family.state_dim)


def random_actions(family: Family, *shape: int) -> Tensor:
    """(...) int64 ids or (..., da) float32"""
    if family.discrete_actions:
        return torch.randint(family.action_dim, shape)
    return 2 * torch.rand(*shape, family.action_dim) - 1


def random_dataset(family: Family, episodes: int, tasks: int = 16, queries: int = 100) -> Dataset:
    """Data without a meaning: the speed does not depend on it."""
    shape = (tasks, episodes, family.horizon)
    rewards = (torch.rand(shape) < 0.3).float()
    returns = rewards.sum(-1)
    return Dataset(
        family=family,
        meta={},
        states=random_states(family, *shape),
        actions=random_actions(family, *shape),
        rewards=rewards,
        query_states=random_states(family, tasks, queries),
        query_actions=random_actions(family, tasks, queries),
        returns=returns,
        order=returns.argsort(dim=1, stable=True),
        state_mean=torch.zeros(family.state_dim),
        state_std=torch.ones(family.state_dim),
    )


# ------------------------------------------------------------------------------------------ playing
def episode_behind(
    method: Method, tasks: int, finished: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two calls: one fills a policy's memory, the other plays an episode of all tasks behind so
    many finished ones. The environment is left out.
    """
    family, horizon = method.family, method.family.horizon
    policy = method.policy(method.cfg.play)
    states, rewards = random_states(family, horizon, tasks), torch.zeros(tasks)
    past = Prompt(
        random_states(family, tasks, horizon),
        random_actions(family, tasks, horizon),
        torch.zeros(tasks, horizon),
    )

    @torch.inference_mode()
    def fill() -> None:
        for i in range(finished):  # a memory fills up by one episode at a time
            policy.begin([past] * i, tasks)

    @torch.inference_mode()
    def play() -> None:
        policy.begin([past] * finished, tasks)
        for t in range(horizon):
            policy.observe(states[t], policy.act(states[t]), rewards)

    return fill, play
