"""presets.py: the settings of the presets, as plain data (paper Tables 4 and 5, App. D, F).

in : preset, environment, the method whose preset it is       out: {setting: value}
Read beside config.py, which says what each setting means.

`paper` is Tables 4 and 5, with the official configuration's sizes, batch, balance weights and
schedules where the paper gives none. `cpu` is what learns most in the minutes that two CPU cores
give; train.py prints every value in which a run departs from `paper`; DEPARTURES.md section 2 has
the reasons in a table, FINDINGS.md what they were learnt from.

What is not named here has its declaration's default (config.py, models.py, dpt.py), which is the
paper's or the official one. Later groups overrule earlier ones: see `values` at the end.
"""

from __future__ import annotations

# fmt: off
# ------------------------------------------------------------------------ paper: Tables 4 and 5
# what all families share, by method: InfoNCE weight 0.01 and 100000 steps are the tables' rule, the
# rest is official. Balance weights: AD's are ten times DPT's there. Episodes: of an evaluation.
PAPER_SHARED = {
    "ad": dict(w_contrastive=0.01, w_importance=0.1, w_load=0.1,
               warmup=10_000, episodes=30, steps=100_000),
    "dpt": dict(w_contrastive=0.01, w_importance=0.01, w_load=0.01,
                warmup=10_000, episodes=30, steps=100_000),
}
# MuJoCo: longer episodes, a wider network. Prompts are 4 episodes of 200 steps (AD) or one (DPT).
_CHEETAH = {
    "ad": dict(layers=3, heads=8, width=256, ff=1024, token_hidden=3072, task_hidden=4096,
               batch=24, prompt_length=800),
    "dpt": dict(layers=4, heads=4, prompt_length=200),
}
PAPER = {
    # DarkRoom alone has K_2 = 12 (AD) and 300000 steps
    ("darkroom", "ad"): dict(
        layers=4, heads=8, width=64, ff=256, token_hidden=768, task_hidden=1536, task_experts=12,
        dropout=0.0, batch=128, prompt_length=400, steps=300_000, episodes=100,
    ),
    ("darkroom", "dpt"): dict(
        prompt_length=100, w_contrastive=0.001, steps=300_000, warmup=5000, episodes=100,
    ),
    ("point-robot", "ad"): dict(prompt_length=80),
    ("point-robot", "dpt"): dict(prompt_length=20, w_contrastive=0.001),
    ("cheetah-vel", "ad"): _CHEETAH["ad"],
    ("cheetah-vel", "dpt"): _CHEETAH["dpt"],
    ("cheetah-vel-3cluster", "ad"): _CHEETAH["ad"],
    ("cheetah-vel-3cluster", "dpt"): _CHEETAH["dpt"],
    ("walker-param", "ad"): _CHEETAH["ad"] | dict(batch=32, episodes=40),
    ("walker-param", "dpt"): _CHEETAH["dpt"] | dict(warmup=5000, episodes=40),
    # Reach alone has learning rate 5e-5, in both tables
    ("reach", "ad"): dict(prompt_length=400, lr=5e-5, schedule="constant"),
    ("reach", "dpt"): dict(width=256, prompt_length=100, lr=5e-5),
    ("push", "ad"): dict(width=256, ff=1024, token_hidden=3072, task_hidden=4096,
                         prompt_length=400),
    ("push", "dpt"): dict(width=256, ff=1024, token_hidden=3072, task_hidden=4096,
                          prompt_length=100, w_contrastive=0.001, schedule="constant"),
}
# Mixed: one episode or a few of every checkpoint (App. D.2). Checkpoints are training steps over
# save frequency, or over n_steps, rounded up (Tables 2, 3): 100, 25, 40, 100, 196 and 489 of them;
# Cheetah-Vel plays 4 episodes of each, its 3-cluster version 3. App. J has "500 episodes" for Push.
PAPER_DATA = {
    "point-robot": dict(data_episodes=100),
    "cheetah-vel": dict(data_episodes=100, data_queries=4000),
    "cheetah-vel-3cluster": dict(data_episodes=120, data_queries=4000),
    "walker-param": dict(data_episodes=100, data_queries=4000),
    "reach": dict(data_episodes=196, data_queries=4000),
    "push": dict(data_episodes=489, data_queries=4000),
}

# ------------------------------------------------ cpu: minutes to an hour a family on two cores
# One teacher for all tasks: between those of their own there is nothing to imitate (FINDINGS.md),
# and further tasks cost it nothing. Few steps, so larger ones (lr), and less entropy (alpha), or
# the best that is reached is still noise.
_CPU_SAC = dict(
    teacher="one", teacher_steps=40_000, teacher_save_every=2000, teacher_warmup=1000,
    teacher_hidden=128, teacher_batch=512, teacher_lr=1e-3, teacher_alpha=0.02, data_episodes=120,
    data_queries=4000,
)
CPU_DATA = {
    # 200 goals, not 45: with 45, held-out goals were worse than those trained on (FINDINGS.md)
    "point-robot": dict(
        train_tasks=200, test_tasks=20, data_episodes=75, data_queries=1500, teacher="one",
        teacher_steps=1500, teacher_save_every=100, teacher_hidden=64, teacher_batch=512,
        teacher_lr=1e-3, teacher_alpha=0.05,
    ),
    "cheetah-vel": dict(train_tasks=50, test_tasks=20, **_CPU_SAC),
    # multiples of 3: as many of each cluster
    "cheetah-vel-3cluster": dict(train_tasks=48, test_tasks=21, **_CPU_SAC),
    # what one teacher makes of 65 numbers generalises: as good on tasks it has never seen
    "walker-param": _CPU_SAC | dict(
        train_tasks=40, test_tasks=20, teacher_steps=120_000, teacher_save_every=4000,
        teacher_lr=7e-4, teacher_gamma=0.97, teacher_layer_norm=True,
    ),
    # Every step says how far the goal is: ten steps ahead are enough (gamma), and what one action
    # is worth is then a tenth of a value, not a hundredth. After more steps actions jump from bound
    # to bound, which returns as much and which is harder to imitate (FINDINGS.md)
    # 150 goals: with 50, those near the edge failed
    "reach": _CPU_SAC | dict(
        train_tasks=150, test_tasks=20, teacher_steps=4000, teacher_save_every=400,
        teacher_gamma=0.9,
    ),
    # its warm-up is demonstrated: Family.demonstrate
    "push": _CPU_SAC | dict(
        train_tasks=50, test_tasks=20, teacher_steps=8000, teacher_save_every=500,
        teacher_alpha=0.2,
    ),
}
# Fewer, larger steps of a smaller network: lr 2e-3 instead of 3e-4 after a short warm-up, 8e-3 with
# Muon, which leaves the plateau, where rewards are not read yet, in half of AdamW's steps; beta2
# 0.98, because 0.999 remembers as many steps as there are; 16 numbers a head, below which the CPU's
# attention is slow. What helps it to learn in so few steps: token_shift (a reward meets its state),
# prefix (the gate of Eq. 4 sees in training what it sees in play), task_center (without it all
# tasks get the same experts).
_CPU_SHARED = dict(
    layers=3, heads=4, width=64, ff=256, token_hidden=768, task_experts=8, task_hidden=1024,
    dropout=0.0, token_shift=True, routing="prefix", task_center=True, w_contrastive=0.01,
    w_importance=0.1, w_load=0.1, optimizer="muon", muon_scale=4.0, warmup=50, lr=2e-3, beta2=0.98,
    checkpoint_every=100, log_every=25, eval_every=400,
)
# history: as many finished episodes as a training context has before its last one (DarkRoom: see
# there). empty: at test time the first prompt is empty, and the query must have seen such prompts.
CPU_SHARED = {
    "ad": _CPU_SHARED | dict(history=3),
    "dpt": _CPU_SHARED | dict(query_position="last", empty=0.1),
}
# Long episodes (100 or 200 steps of a continuous family) make long rows, hence fewer of them.
# task_balance: without it a task expert dies here.
# Recipes: a prompt by the task's own teachers gives the task away through its actions. With
# `explore` other tasks' teachers play most of a prompt; DPT's labels are the task's own whoever
# plays, and AD imitates the task's best episodes alone (best): their mean is an action, that of all
# behaviours is none. `wander` for an AD that imitates all it reads and cannot imitate random
# actions. A first episode at random sees more than the mean action.
_CPU_SAC_AD = dict(
    recipe="explore", best=0.1, steps=700, batch=12, episodes=15, first="random",
    prompt_length=400, history=1, eval_every=250, task_balance=0.003,
)
_CPU_SAC_DPT = dict(
    recipe="explore", steps=600, batch=16, queries=32, short=0.2, episodes=10, eval_every=500,
    task_balance=0.003,
)
# Without a reward draws of all goals' mean action stay in the middle of the room: flatter ones
# search better. With a reward there is nothing to draw (FINDINGS.md).
_SEARCH = dict(actions="search", temperature=4.0)
CPU = {
    # The paper's data, prompts of six episodes. Played are four (history + 1), the last of which is
    # then one of the middle: where nothing was found yet, its behaviour still searches.
    ("darkroom", "ad"): dict(
        prompt_length=600, steps=400, batch=6, episodes=40, **_SEARCH,
    ),
    # Prompts of one episode, the memory that Algorithm 4 has, and three times as many of them.
    ("darkroom", "dpt"): dict(
        recipe="explore", data_episodes=400, prompt_length=100, batch=36, queries=16, steps=900,
        episodes=40, task_balance=0.02, **_SEARCH,
    ),
    # components: AD imitates many behaviours at once and must choose one; their draws also search,
    # where mean actions only repeat the best episodes, which are all that Algorithm 2 keeps.
    # temperature: the likely ones more often, which still searches and wastes fewer steps.
    ("point-robot", "ad"): dict(
        recipe="wander", steps=1400, batch=32, episodes=40, components=4, spread=0.0,
        temperature=0.4, first="random", task_balance=0.02,
    ),
    # first, prompt: an empty prompt's mean action stays at the start and sees nothing from there
    ("point-robot", "dpt"): dict(
        recipe="explore", steps=800, batch=32, queries=32, prompt_length=60, episodes=20,
        prompt="all", first="random", task_balance=0.02,
    ),
    ("cheetah-vel", "ad"): _CPU_SAC_AD,
    ("cheetah-vel", "dpt"): _CPU_SAC_DPT,
    ("cheetah-vel-3cluster", "ad"): _CPU_SAC_AD,
    ("cheetah-vel-3cluster", "dpt"): _CPU_SAC_DPT,
    ("walker-param", "ad"): _CPU_SAC_AD,
    ("walker-param", "dpt"): _CPU_SAC_DPT,
    # noise: mean actions repeat the best episode, and what stopped short of the goal stays there
    ("reach", "ad"): _CPU_SAC_AD | dict(steps=2000, prompt_length=300, history=2, noise=0.4),
    # where the goal is must be read from rewards alone, which 600 steps do not learn; three
    # episodes say it more exactly than one, and need not read one another
    ("reach", "dpt"): _CPU_SAC_DPT | dict(
        steps=2000, batch=8, prompt_length=300, independent=True, prompt="all",
    ),
    ("push", "ad"): _CPU_SAC_AD | dict(prompt_length=300, history=2),
    # The exact numbers of a grasp are a small part of a token: embed_gain. Noise: without it a
    # grasp that has missed misses again, at the same place.
    ("push", "dpt"): _CPU_SAC_DPT | dict(
        steps=2000, prompt_length=200, independent=True, prompt="all", embed_gain=4.0, noise=0.2,
    ),
}
# a family of the user's
CPU_OWN = {
    "ad": dict(steps=1000, batch=16, episodes=20),
    "dpt": dict(steps=1000, batch=16, queries=32, short=0.2, episodes=20),
}
# fmt: on


def data_values(preset: str, env: str) -> dict:
    """What collecting depends on, before a method has its say: collect.py knows of none."""
    return PAPER_DATA.get(env, {}) | (CPU_DATA.get(env, {}) if preset == "cpu" else {})


def values(preset: str, env: str, method: str, horizon: int) -> dict:
    """All settings of a preset; `method` is the one whose preset it is: ad or dpt.

    A family of the user's gets prompts as long as Tables 4 and 5 have them: four episodes for AD,
    one for DPT.
    """
    prompt_length = 4 * horizon if method == "ad" else horizon
    # the right side of | wins: a family over what all share, `cpu` over `paper`
    chosen = PAPER_SHARED[method] | dict(prompt_length=prompt_length)
    chosen |= PAPER_DATA.get(env, {}) | PAPER.get((env, method), {})
    if preset == "cpu":
        chosen |= (
            CPU_DATA.get(env, {}) | CPU_SHARED[method] | CPU.get((env, method), CPU_OWN[method])
        )
    return chosen
