"""train.py: offline training of a method (paper Sec. 4.3, App. A: Algorithms 1 and 3).

in : a `Config` (the command line)      out: runs/<name>/ with checkpoint, train.csv, evaluation
Read after ad.py and dpt.py, before evaluate.py.

    python train.py --env darkroom --backbone dpt                       collect, train, evaluate
    python train.py --env darkroom --backbone ad --resume               continue where it stopped
    torchrun --nproc-per-node 2 train.py --env darkroom --backbone dpt  data parallel

`training_step` is one iteration of both algorithms: what is drawn, which losses there are and what
follows a step, the method says (methods.py). `train` repeats it; what is logged and kept on the way
stands in support/journal.py.

Symbols (paper -> here): L(theta), L_balance, w_con * L_contrastive -> the terms of `losses`,
"imitation", "balance", "contrastive"; 2B, B queries and B keys -> `batch` (rows of one process).
Where the paper is silent: AdamW, a clipped gradient, and warm-up and schedule of the official
configuration (presets.py).
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    from support.stop import at_once

    at_once()

import contextlib
import functools
import importlib.util
import math
import operator
import os
import signal
from pathlib import Path

import torch
from torch import Tensor

from collect import collect, dataset_folder
from config import Config, Training
from data import Dataset, load_dataset, rows
from envs import get_family
from evaluate import Evaluation, check_summary, evaluate_run
from methods import Method, get_method
from support import checkpoint, distributed
from support.command_line import (
    changed_settings,
    default_folder,
    differences,
    one_line,
    parse_config,
)
from support.files import check_folder, only_writer
from support.journal import Journal
from support.stop import Signals


# ------------------------------------------------------------------------------ Algorithms 1 and 3
def training_step(method: Method, batch) -> dict[str, Tensor]:
    """Algorithm 1, lines 11-15; Algorithm 3, lines 18-22. Returns what is logged, by name.

    Raises ValueError when the loss or its gradient is not finite; then no weight has changed.
    """
    cfg, device = method.cfg, method.device.type
    # bfloat16, not float16: it has float32's range, so that gradients need no scaling.
    half = cfg.run.dtype == "bfloat16" or (cfg.run.dtype == "auto" and device == "cuda")
    # Alg. 1 l. 11-13, Alg. 3 l. 18-20. Half precision is for products alone: routers and losses
    # leave autocast where they are computed.
    with torch.autocast(device, torch.bfloat16, enabled=half):
        terms, metrics = method.losses(batch)  # L(theta), L_balance, w_con * L_contrastive
    # Alg. 1 l. 14, Alg. 3 l. 21: L = L(theta) + L_balance + w_con * L_contrastive. The weights are
    # in the terms already; the method may have any number of them.
    loss = functools.reduce(operator.add, terms.values())
    for optimizer in method.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    # Noise in the routers and few positives make some batches' gradients far larger than others'.
    norm = torch.nn.utils.clip_grad_norm_(method.model.parameters(), cfg.training.clip)
    # Before the step: afterwards every weight would be NaN, and so would the next checkpoint.
    if not torch.isfinite(loss + norm):
        raise ValueError(
            f"the loss or its gradient is not finite (loss {loss.item()}, gradient norm "
            f"{norm.item()}): try a lower --lr"
        )
    for optimizer in method.optimizers.values():
        optimizer.step()
    # Alg. 1 l. 15, Alg. 3 l. 22: Eq. 8. The key router follows the weights that this step has made;
    # the optimisers never touch it.
    method.after_step()
    return {"loss": loss, **terms, **metrics, "grad_norm": norm}


def train(method: Method, dataset: Dataset, journal: Journal, signals: Signals) -> None:
    """Algorithms 1 and 3, the outer loop: from the journal's step to the last, or to Ctrl-C."""
    state, steps = journal.state, method.cfg.training.steps
    method.model.train()
    while state.step < steps:
        # from the step's number alone: a resumed run has the rate of the uninterrupted one
        set_learning_rate(method, state.step)
        batch = draw(method, dataset, state.rng)  # a stream of its own: see below
        try:
            values = training_step(method, batch)
        except ValueError as error:
            raise ValueError(f"step {state.step}: {error}; {journal.what_is_left()}") from None
        state.step += 1
        if journal.after_step(values, stop=bool(signals.number)):
            break


def draw(method: Method, dataset: Dataset, rng: torch.Generator):
    """Algorithm 1, lines 2-10; Algorithm 3, lines 8-17: the rows of this process.

    Every process draws the whole batch from the same stream and keeps its own rows.
    """
    # So N processes learn from what one process with an N-fold batch learns from, and the streams
    # need no tuning to one another. A draw is cheap; the pass over it is what is shared out.
    # With --dropout they do not quite: all draw the same masks, each for its own rows.
    mine, draws = method.cfg.training.batch, method.cfg.training.draws
    batch = method.sample(dataset, mine * distributed.world(), draws, rng)
    first = mine * distributed.rank()
    return rows(batch, slice(first, first + mine)).to(method.device)


def learning_rate(cfg: Training, step: int) -> float:
    """Linear warm-up, then cosine to 0 (or constant)."""
    if step < cfg.warmup:  # + 1: the first step moves too
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)  # 0 to 1
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(method: Method, step: int) -> None:
    """A method with several optimisers may give a group another rate: `lr_scale` times this."""
    rate = learning_rate(method.cfg.training, step)
    for optimizer in method.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)


# ------------------------------------------------------------------------------------- a whole run
def get_data(cfg: Config) -> Dataset:
    """Collect what is missing (one process), then load it (every process, once)."""
    dataset, folder = None, cfg.training.data
    if distributed.rank() == 0:  # the others would find a folder that is being written
        folder = folder or collect(cfg.collection)
        dataset = load_dataset(folder, cfg.data.env)
    distributed.barrier()  # from here on the data are there
    dataset = dataset or load_dataset(folder or dataset_folder(cfg.collection), cfg.data.env)
    # --data takes any folder, of which the command line cannot know how many episodes it has
    if cfg.training.prompt_length > dataset.episodes * dataset.family.horizon:
        raise ValueError(
            f"--prompt-length {cfg.training.prompt_length} needs more than the data's "
            f"{dataset.episodes} episodes"
        )
    return dataset


def make_method(cfg: Config, device: torch.device) -> Method:
    """The method with its first weights, wrapped as the run has it."""
    # torch's own stream: weights now; later router noise (Eq. 14) and dropout
    torch.manual_seed(cfg.seed)
    method = get_method(cfg.backbone)(cfg, get_family(cfg.data.env))
    method.model.to(device)
    if cfg.run.compile:
        method.forward = torch.compile(method.model)  # `model` itself keeps plain names and saves
    if distributed.active():
        # Without a second draw of a task Eq. 7 is 0 and its W has no gradient, for which DDP would
        # wait; to look for such weights costs time, hence only then.
        unused = cfg.training.draws == 1
        method.forward = torch.nn.parallel.DistributedDataParallel(
            method.forward, find_unused_parameters=unused
        )
    return method


def open_run(cfg: Config) -> tuple[Path, bool]:
    """The run's folder and whether there is something to continue. Nothing on disk is touched.

    Raises ValueError for a folder of something else, and for a run that is not to be continued.
    """
    folder = Path(cfg.run.run or default_folder(cfg))
    # an empty folder was perhaps made for this run; anything else in it must be a run
    if not folder.exists():
        check_folder("--run", str(folder))
        return folder, False
    if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
        return folder, False  # a lock alone: it was stopped before it wrote anything
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} exists and is not a t2mir run: choose another --run")
    if not cfg.run.resume:
        raise ValueError(
            f"{folder} already holds a run: add --resume to continue it, or choose another --run"
        )
    old = checkpoint.load_config(folder, env=cfg.data.env, backbone=cfg.backbone)
    changed = changed_settings(old, cfg)
    if changed:
        raise ValueError(
            f"{folder} was started with other settings ({', '.join(changed)}): repeat "
            "the flags of its first command, or choose another --run"
        )
    return folder, True


def run(cfg: Config) -> None:
    """Collect, train, evaluate."""
    device = distributed.start(distributed.resolve_device(cfg.run.device))
    # the processes share the cores: more threads than cores wait for one another
    torch.set_num_threads(cfg.run.threads or max(1, (os.cpu_count() or 1) // distributed.world()))
    if cfg.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package: pip install 't2mir[tensorboard]'")
    folder, continued = open_run(cfg)
    check_summary(folder.parent / "summary.csv")  # the evaluation at the end appends to it
    chief = distributed.rank() == 0  # of several processes one prints and writes
    if chief:
        threads = torch.get_num_threads()
        print(f"preset {cfg.preset} on {device}, {threads} threads, run in {folder}")
        print("departs from the paper preset in " + ("; ".join(differences(cfg)) or "nothing"))
    first = make_method(cfg, device)  # what is wrong with it shows now, not after collecting
    if cfg.training.init and not continued:
        checkpoint.load_weights(cfg.training.init, first)
    del first  # with all that it holds on the device
    dataset = get_data(cfg)
    # One writer a run, until it is evaluated: a second one would mix its rows with these.
    with only_writer(folder) if chief else contextlib.nullcontext():
        _, continued = open_run(cfg)  # again: another process may have begun it meanwhile
        train_and_evaluate(cfg, device, dataset, folder, continued)
    distributed.stop()


def train_and_evaluate(
    cfg: Config, device: torch.device, dataset: Dataset, folder: Path, continued: bool
) -> None:
    """From the first weights, or those of a checkpoint, to the curve. Exits where it is stopped."""
    chief = distributed.rank() == 0
    method = make_method(cfg, device)
    # Held-out states are normalised by what training saw: a checkpoint keeps both.
    method.state_mean, method.state_std = dataset.state_mean, dataset.state_std
    # Batches have a stream of their own, so that two networks (an ablation's, say) that draw other
    # weights and noise see the same batches. Seed + 1: not torch's own numbers once more.
    state = checkpoint.State(method, torch.Generator().manual_seed(cfg.seed + 1))
    if continued and (folder / checkpoint.FILE).exists():
        checkpoint.load(folder, state)
    elif cfg.training.init:
        checkpoint.load_weights(cfg.training.init, method)
    with Signals() as signals, Journal(state, dataset, folder) as journal:
        train(method, dataset, journal, signals)
    if state.step < cfg.training.steps:  # Ctrl-C, or a polite kill
        if chief:
            steps = f"step {state.step} of {cfg.training.steps}"
            print(f"stopped at {steps}; the same command with --resume continues")
        distributed.stop()
        # as a shell counts signals; another process was told to stop where this one was not
        raise SystemExit(128 + (signals.number or signal.SIGTERM))
    if chief:
        names = {"env": cfg.data.env, "backbone": cfg.backbone}
        evaluate_run(Evaluation(str(folder), device=str(device), play=cfg.play, **names))


if __name__ == "__main__":
    one_line(lambda: run(parse_config()), "the same command with --resume continues")
