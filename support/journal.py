"""journal.py: what happens beside training: train.csv, progress, short evaluations, checkpoints.

in : the numbers of each training step          out: files in the run's folder
train.py calls `after_step` once a step and knows nothing else of this. Of several processes the
first one writes; all of them end together when one is asked to. Nothing of the paper is here.

A row of train.csv holds the mean of each number over the steps since the last row; their sums so
far are part of a checkpoint (`State.sums`), so that a run that is stopped between two rows writes,
continued, the row that it would have written.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor

from data import Dataset
from diagnostics import probe
from evaluate import play
from support import checkpoint, distributed
from support.checkpoint import State
from support.files import progress, write_atomically


class Log:
    """train.csv, and TensorBoard if asked for: a row of named numbers at a time.

    Columns are the names that come; one that comes later (a short evaluation's) is added to all
    rows. A resumed run drops the rows that its checkpoint has not seen. Raises ValueError when the
    others are not those that it has seen (`seen`: their checksum). Nothing is written yet.
    """

    def __init__(self, folder: Path, step: int, seen: str | None = None):
        self.folder, self.path, self.step = folder, folder / "train.csv", step
        self.rows: list[dict] = []
        self.columns: list[str] = []
        self._sum = 0
        self.board = None
        if not self.path.exists():
            return
        try:
            text = self.path.read_bytes().decode()
            # a kill may have left half a row at the end
            old = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
            rows = [row for row in old if (row.get("step") or "").isdecimal()]
        except (csv.Error, UnicodeDecodeError):
            rows, old = [], None
        self.rows = [row for row in rows if int(row["step"]) <= step]
        self.columns = list(old.fieldnames or []) if old else []
        for row in self.rows:
            self._add(row)
        if seen is not None and seen != self.checksum:
            raise ValueError(
                f"{self.path} is damaged: its rows are not those that {checkpoint.FILE} has seen; "
                "move it away to continue without them"
            )

    @property
    def checksum(self) -> str:
        """Of all rows: a checkpoint keeps it."""
        return f"{self._sum:08x}"

    def _add(self, row: dict) -> None:
        said = sorted((str(k), str(v)) for k, v in row.items() if v not in ("", None))
        self._sum = zlib.crc32(json.dumps(said).encode(), self._sum)

    def begin(self, tensorboard: bool) -> None:
        """From here on rows are written."""
        if self.path.exists():
            self._rewrite()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional; checked by train.py

            # what lies behind the checkpoint is drawn anew
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)

    def _rewrite(self) -> None:
        """The whole file, old or new at any moment: a kill loses nothing of it."""

        def write(path: Path) -> None:
            with open(path, "w", newline="") as file:
                out = csv.DictWriter(file, self.columns, restval="")
                out.writeheader()
                out.writerows(self.rows)

        write_atomically(self.path, write)

    def row(self, values: dict) -> None:
        row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        self.rows.append(row)
        self._add(row)
        new = [name for name in row if name not in self.columns]
        if new:  # the head of the file changes, so all of it is written again
            self.columns += new
            self._rewrite()
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, values["step"])


class Journal:
    """Follows a run; a context manager around the training loop."""

    def __init__(self, state: State, dataset: Dataset, folder: Path):
        self.state, self.dataset, self.folder = state, dataset, folder
        self.cfg = state.method.cfg
        self.chief = distributed.rank() == 0
        rows = self.cfg.training.batch * distributed.world()
        self.tokens = rows * state.method.tokens()  # of a step, over all processes
        test = dataset.meta["test_tasks"]
        # as many trained tasks as held-out ones: the same noise in both returns
        self.played = {"test": test, "train": dataset.meta["train_tasks"][: len(test)]}
        self.last_return = math.nan

    def __enter__(self) -> Journal:
        state, run = self.state, self.cfg.run
        if self.chief:
            self.log = Log(self.folder, state.step, state.rows or None)
            meta = self.dataset.meta
            tasks = {"train": meta["train_tasks"], "test": meta["test_tasks"]}
            tasks["reference"] = meta.get("reference")
            state.run = checkpoint.describe_run(self.cfg, tasks)
            checkpoint.write_config(self.folder, state.run)
            self.log.begin(run.tensorboard)
        self.bar = progress(
            total=self.cfg.training.steps,
            initial=state.step,
            desc=self.folder.name,
            unit="step",
            disable=not self.chief,
        )
        self.row_time, self.row_steps = time.perf_counter(), 0
        self.begun = self.row_time - state.seconds
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def after_step(self, values: dict[str, Tensor], stop: bool) -> bool:
        """Note the numbers of a step that was just taken; whether training should end now."""
        state, run = self.state, self.cfg.run
        state.seconds = time.perf_counter() - self.begun
        # If one process was told to stop, all do: one that went on alone would wait for the others
        # for ever. The wish travels with the numbers; any process's makes the mean positive.
        asked = torch.tensor(float(stop), device=state.method.device)
        columns = torch.stack([*(v.detach().float() for v in values.values()), asked])
        *numbers, asked = distributed.all_reduce_mean(columns).tolist()
        for name, number in zip(values, numbers, strict=True):
            state.sums[name] = state.sums.get(name, 0.0) + number
        self.row_steps += 1
        self.bar.update()
        last = state.step == self.cfg.training.steps
        if self.chief and (state.step % run.log_every == 0 or last):
            self._write_row(last)
        # after the row, before the checkpoint: a new row begins
        if state.step % run.log_every == 0:
            state.sums = {}
        if self.chief and (state.step % run.checkpoint_every == 0 or last or asked):
            state.rows = self.log.checksum
            checkpoint.save(self.folder, state)
        return bool(asked)

    def _write_row(self, last: bool) -> None:
        """Means since the last row, speed, and what fresh draws and short evaluations show."""
        state, cfg = self.state, self.cfg
        steps = (state.step - 1) % cfg.run.log_every + 1  # in the sums; the last row may have fewer
        speed = self.row_steps * self.tokens / (time.perf_counter() - self.row_time)
        rate = next(iter(state.method.optimizers.values())).param_groups[0]["lr"]
        row = {
            "step": state.step,
            "seconds": state.seconds,
            "tokens_per_s": speed,
            "lr": rate,
            **{name: total / steps for name, total in state.sums.items()},
            # by seed and step: a resumed run looks at the same draws as the uninterrupted one
            **probe(state.method, self.dataset, cfg.seed + state.step),
        }
        # the first row at or behind each multiple: the two intervals need not divide
        due = cfg.run.eval_every and state.step % cfg.run.eval_every < cfg.run.log_every
        if due and not last:
            row |= self._short_evaluation()
        self.log.row(row)
        text = f"loss {row['loss']:.3f}, {speed / 1000:.1f}k tokens/s"
        if not math.isnan(self.last_return):  # NaN until the first short evaluation
            text += f", return {self.last_return:.1f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.row_time, self.row_steps = time.perf_counter(), 0  # speed leaves evaluations out

    def _short_evaluation(self) -> dict[str, float]:
        """Mean return of the last of a few episodes, on held-out and on trained tasks."""
        method, found = self.state.method, {}
        for split, tasks in self.played.items():
            policy = method.policy(self.cfg.play)
            returns = play(self.cfg.data.env, tasks, policy, self.cfg.run.eval_episodes)
            found[f"return_{split}"] = returns[:, -1].mean().item()
        self.last_return = found["return_test"]
        method.model.train()  # a policy puts it into eval mode
        return found

    def what_is_left(self) -> str:
        """What is left when training fails."""
        if (self.folder / checkpoint.FILE).exists():
            return f"the last checkpoint in {self.folder} is intact"
        return "there is no checkpoint yet"
