"""train.py: offline training of T2MIR-AD and T2MIR-DPT (paper Sec. 4.3, App. A: Algorithms 1 and 3).

in : a `Config` (the command line)      out: runs/<name>/ with checkpoint, train.csv and the evaluation
Read after models.py.

    python train.py --env darkroom --backbone dpt                       collect, train, evaluate
    python train.py --env darkroom --backbone ad --resume               continue where it stopped
    torchrun --nproc-per-node 2 train.py --env darkroom --backbone dpt  data parallel

The loop is the two algorithms; what differs between them is the sampler and what the labels are.
Differs from the paper: both halves of a batch, tau and tau' (Algorithm 1, line 10), are imitated, and each
serves as key for the other, so that one forward pass does all of it (as in the official code).
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from collect import collect, dataset_folder
from config import FREE, PLAYED, Config, differences, parse
from data import ADBatch, Dataset, DPTBatch, load_dataset, rows, sample_ad, sample_dpt
from diagnostics import probe
from evaluate import check_summary, evaluate_run, play
from models import T2MIR, Output
from policies import make_policy
from support import checkpoint, distributed
from support.files import progress


def sample(dataset: Dataset, cfg: Config, rng: torch.Generator) -> ADBatch | DPTBatch:
    """Lines 2-9 of Algorithm 1 or lines 8-16 of Algorithm 3: the rows of this process."""
    episodes, everyone = cfg.prompt_length // dataset.spec.horizon, cfg.batch * distributed.world()
    if cfg.backbone == "ad":
        batch = sample_ad(dataset, everyone, episodes, cfg.draws, rng)
    else:
        batch = sample_dpt(
            dataset, everyone, episodes, cfg.draws, rng, cfg.queries, cfg.short, cfg.empty
        )
    first = cfg.batch * distributed.rank()
    return rows(batch, slice(first, first + cfg.batch))


def imitation_loss(output: Output, batch: ADBatch | DPTBatch, discrete: bool) -> Tensor:
    """L(theta) of Eq. 10 (AD: the action of every step) or Eq. 11 (DPT: a*, at every read-out): cross-entropy
    for discrete actions, mean squared error for continuous ones; the mean over all predictions.
    """
    if isinstance(batch, ADBatch):
        target = batch.prompt.actions
    else:
        target = batch.query_actions
        if target.shape[1] == 1:  # query first: one label for all n + 1 read-outs
            target = target.expand(-1, output.action.shape[1], *target.shape[2:])
    if discrete:
        return F.cross_entropy(output.action.flatten(0, 1).float(), target.flatten())
    return F.mse_loss(output.action.float(), target)


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then cosine to 0 (or constant)."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(model: T2MIR, cfg: Config) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, not on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)


class Log:
    """train.csv, and TensorBoard if asked for. A resumed run drops the rows that its checkpoint has not seen."""

    # fmt: off
    COLUMNS = (
        "step", "seconds", "tokens_per_s", "lr", "loss", "imitation", "balance", "contrastive", "accuracy", "grad_norm",
        # on fresh draws (diagnostics.py)
        "token_mi", "token_least", "task_least", "contrastive_fresh", "accuracy_fresh", "chance", "kl_reward",
        "kl_no_reward", "return_test", "return_train",
    )
    # fmt: on

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        path = folder / "train.csv"
        kept = []
        if path.exists():
            with open(path, newline="") as file:
                kept = [
                    row
                    for row in csv.DictReader(file)
                    if row.get("step", "").isdigit() and int(row["step"]) <= step
                ]
        self.file = open(path, "w", newline="")  # noqa: SIM115 (open as long as the run)
        self.csv = csv.DictWriter(self.file, self.COLUMNS)
        self.csv.writeheader()
        self.csv.writerows(kept)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # an optional extra, checked by main()

            self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def row(self, values: dict) -> None:
        self.csv.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self.file.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, values["step"])


def open_run(cfg: Config) -> tuple[Path, bool]:
    """The run's folder and whether there is something to continue. Nothing on disk is touched.

    Raises ValueError when the folder holds a run and --resume was not given, or one of other settings.
    """
    folder = Path(cfg.folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder, False
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} exists and is not a t2mir run: choose another --run")
    if not cfg.resume:
        raise ValueError(
            f"{folder} already holds a run: add --resume to continue it, or choose another --run"
        )
    old, new = checkpoint.read_config(folder), json.loads(json.dumps(asdict(cfg)))
    changed = [k for k in new if k not in FREE and new[k] != old.get(k)]
    if changed:
        listed = ", ".join(f"{k} {old.get(k)} -> {new[k]}" for k in changed)
        raise ValueError(
            f"{folder} was started with other settings ({listed}): choose another --run"
        )
    return folder, True


def train(cfg: Config, folder: Path, continued: bool, device: torch.device) -> None:
    main = distributed.rank() == 0
    torch.manual_seed(cfg.seed)  # weights, router noise, dropout
    rng = torch.Generator().manual_seed(cfg.seed + 1)  # batches
    dataset = load_dataset(cfg.data or dataset_folder(cfg.collect()), cfg.env)
    if cfg.prompt_length > dataset.episodes * dataset.spec.horizon:
        raise ValueError(
            f"--prompt-length {cfg.prompt_length} needs more than the data's {dataset.episodes} episodes"
        )
    model = T2MIR(cfg.model()).to(device)
    optimizer = make_optimizer(model, cfg)
    state = checkpoint.State(model, optimizer, rng, dataset.state_mean, dataset.state_std)
    if continued and (folder / checkpoint.FILE).exists():
        checkpoint.load(folder, state)
    elif cfg.init:
        checkpoint.load_weights(cfg.init, model)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        tasks = {"train": dataset.meta["train_tasks"], "test": dataset.meta["test_tasks"]}
        checkpoint.write_config(folder, cfg, tasks | {"reference": dataset.meta.get("reference")})
        log = Log(folder, state.step, cfg.tensorboard)

    runner = model
    if cfg.compile:
        runner = torch.compile(runner)
    if distributed.active():
        runner = torch.nn.parallel.DistributedDataParallel(
            runner, find_unused_parameters=cfg.draws == 1
        )
    half = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    tokens = (
        cfg.batch
        * distributed.world()
        * (3 * cfg.prompt_length + (cfg.queries if cfg.backbone == "dpt" else 0))
    )
    held_out, trained_on = (
        dataset.meta["test_tasks"],
        dataset.meta["train_tasks"][: len(dataset.meta["test_tasks"])],
    )

    stopped = []  # the signal that asked for an end; the step in hand is finished first
    handlers = {
        s: signal.signal(s, lambda number, _: stopped.append(number))
        for s in (signal.SIGINT, signal.SIGTERM)
    }
    bar = progress(
        total=cfg.steps, initial=state.step, desc=folder.name, unit="step", disable=not main
    )
    since, fresh, last_return = time.perf_counter(), 0, float("nan")
    started = since - state.seconds
    model.train()
    asked = 0.0
    while state.step < cfg.steps and not asked:
        rate = learning_rate(cfg, state.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = sample(dataset, cfg, rng).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = runner(batch)
        imitation = imitation_loss(output, batch, model.cfg.discrete_actions)  # Eq. 10 or 11
        loss = (
            imitation + output.balance + cfg.w_contrastive * output.contrastive
        )  # Alg. 1 l. 14, Alg. 3 l. 21
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        if not torch.isfinite(loss + norm):
            bar.close()
            raise ValueError(
                f"the loss or its gradient is not finite at step {state.step} (loss {loss.item()}, gradient norm "
                f"{norm.item()}); the last checkpoint in {folder} is intact: try a lower --lr"
            )
        optimizer.step()
        model.update_key_router(cfg.momentum)  # Eq. 8, Alg. 1 l. 15, Alg. 3 l. 22
        state.step += 1
        state.seconds = time.perf_counter() - started

        terms = {
            "loss": loss,
            "imitation": imitation,
            "balance": output.balance,
            "contrastive": output.contrastive,
            "accuracy": output.accuracy,
            "grad_norm": norm,
        }
        asked = torch.tensor(
            float(bool(stopped)), device=device
        )  # if one process was told to stop, all do
        *values, asked = distributed.mean(
            torch.stack([*(v.detach().float() for v in terms.values()), asked])
        ).tolist()
        for name, value in zip(terms, values, strict=True):
            state.sums[name] = state.sums.get(name, 0.0) + value
        fresh += 1
        bar.update()
        last = state.step == cfg.steps
        if main and (state.step % cfg.log_every == 0 or last):
            now = time.perf_counter()
            many = (state.step - 1) % cfg.log_every + 1
            row = {k: v / many for k, v in state.sums.items()}
            speed = fresh * tokens / (now - since)
            row |= {"step": state.step, "seconds": state.seconds, "tokens_per_s": speed, "lr": rate}
            row |= probe(model, dataset, cfg, cfg.seed + state.step, device)
            if cfg.eval_every and state.step % cfg.eval_every < cfg.log_every and not last:
                for name, tasks in (("return_test", held_out), ("return_train", trained_on)):
                    policy = make_policy(model, cfg, mean=dataset.state_mean, std=dataset.state_std)
                    row[name] = play(cfg.env, tasks, policy, cfg.eval_episodes)[:, -1].mean().item()
                last_return = row["return_test"]
                model.train()
            log.row(row)
            bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {speed / 1000:.1f}k tokens/s, return {last_return:.1f}",
                refresh=False,
            )
            since, fresh = time.perf_counter(), 0
        if state.step % cfg.log_every == 0:
            state.sums = {}
        if main and (state.step % cfg.checkpoint_every == 0 or last or asked):
            checkpoint.save(folder, state)
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if asked:
        if main:
            print(
                f"stopped at step {state.step} of {cfg.steps}; the same command with --resume continues"
            )
        distributed.stop()
        raise SystemExit(128 + (stopped[0] if stopped else signal.SIGTERM))


def main(argv: list[str] | None = None) -> None:
    try:
        cfg = parse(argv)
        device = distributed.start(distributed.resolve_device(cfg.device))
        torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // distributed.world()))
        if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard needs the package: pip install 'tensorboard'")
        folder, continued = open_run(cfg)
        check_summary(folder.parent / "summary.csv")  # the evaluation at the end appends to it
        if cfg.init and not continued:
            checkpoint.load_weights(
                cfg.init, T2MIR(cfg.model())
            )  # refused now rather than after collecting
        chief = distributed.rank() == 0
        if chief:
            print(
                f"preset {cfg.preset} on {device}, {torch.get_num_threads()} threads, run in {folder}"
            )
            changes = differences(cfg)
            print(
                "departs from the paper preset in " + ("; ".join(changes) if changes else "nothing")
            )
            if cfg.data:
                load_dataset(cfg.data, cfg.env)  # refused by one process, before the others read it
            else:
                collect(cfg.collect())
        distributed.barrier()
        train(cfg, folder, continued, device)
        if chief:
            played = {name: getattr(cfg, name) for name in PLAYED}
            evaluate_run(folder, **played, device=str(device))
        distributed.stop()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:  # while collecting or evaluating; the training loop ends by itself
        raise SystemExit("stopped; the same command with --resume continues") from None


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
