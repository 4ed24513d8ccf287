"""One step of training: gradient, clip, AdamW, learning rate, average; and what makes it fast."""

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from machine import enough_memory, rank_and_world
from recorded import compiled, recorded

# Seconds on an H200: what torch.compile takes, and what it saves in a step and in that step's pixels
COMPILE_SECONDS, SAVED_BY_STEP, SAVED_BY_PIXEL = 45, 1e-3, 1e-8

Loss = Callable[..., Tensor]  # the mean loss of a batch


class LossModule(nn.Module):
    """A loss as a module that owns its network, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, loss_of: Loss):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, *batch: Tensor | None) -> Tensor:
        return self.loss_of(*batch)


class TrainingStep:
    """A function of (loss_of, *batch) that trains `model` in place by one step.

    The arguments are those of `training.Run`; total_steps: of the whole run; precision: the context in which
    the loss is computed.
    `average` is the averaged network, `steps` the number of steps taken.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, total_steps: int, micro_batch_size: int,
                 precision: torch.autocast, decay: float):
        self.model, self.average = model, deepcopy(model).eval().requires_grad_(False)
        self.total_steps, self.micro_batch_size = total_steps, micro_batch_size
        self.precision, self.decay, self.steps = precision, decay, 0
        self.device = next(model.parameters()).device.type
        self.rank, self.world = rank_and_world()
        self._loss_of, self._average_weight = None, torch.zeros((), device=self.device)
        lr = torch.tensor(learning_rate, device=self.device)  # a tensor: a recorded step sees it change
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, fused=True,
                                           capturable=self.device == "cuda")
        self.lr_schedule = LambdaLR(self.optimizer, self._lr_factor)

    def _lr_factor(self, step: int) -> float:
        warm_up = min(1, (step + 1) / max(1, self.total_steps // 20))
        return warm_up * (1 + math.cos(math.pi * step / self.total_steps)) / 2

    def begin(self) -> None:
        """Forgets the recorded step: what the loss uses may be new in another loop, such as the schedule."""
        self._loss_of = self._step = self._over_processes = None
        gc.collect()  # an earlier run's recorded step is in a cycle, and holds its memory

    def parts(self) -> dict:
        """What has a state, by its name in a file."""
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer,
                "lr_schedule": self.lr_schedule}

    def load(self, state: dict, steps: int) -> None:
        """Goes on from the state of all parts after so many steps, perhaps of a run of another length."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.steps = steps
        (group,) = self.optimizer.param_groups
        group["lr"].fill_(group["initial_lr"] * self._lr_factor(steps))  # the saved one falls over the saved run's length

    def __call__(self, loss_of: Loss, *batch: Tensor | None) -> Tensor:
        """Takes one step; returns the loss of this process's share and the gradient's norm, (2,).

        loss_of, batch: as for `Run.step`, the images first. Where the gradient is not finite nothing
        changes (but on Apple's GPUs, whose AdamW knows no `found_inf`).
        """
        share = len(batch[0]) // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        batch = [x if x is None else x[mine] for x in batch]
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))  # forgets the random start quickly
        self._average_weight.fill_(1 - decay)
        with enough_memory("micro_batch_size", min(self.micro_batch_size, share)):
            if loss_of is not self._loss_of:
                self._loss_of, self._step = loss_of, self._fastest_step(loss_of, *batch)
            result = self._step(*batch)
        self.lr_schedule.step()
        self.steps += 1
        return result

    def _plain_step(self, loss_of: Loss, *batch: Tensor | None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        size, loss = len(batch[0]), torch.zeros((), device=self.device)
        for start in range(0, size, self.micro_batch_size):
            end = start + self.micro_batch_size
            part = [x if x is None else x[start:end] for x in batch]
            alone = self._over_processes and end < size  # the last part sums over the processes
            with self._over_processes.no_sync() if alone else nullcontext():
                with self.precision:
                    part_loss = loss_of(*part) * (len(part[0]) / size)
                part_loss.backward()
            loss += part_loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        finite = norm.isfinite().float()
        self.optimizer.found_inf = 1 - finite  # where 1, AdamW changes nothing (as for GradScaler)
        self.optimizer.step()
        average, weights = list(self.average.parameters()), [p.detach() for p in self.model.parameters()]
        change = torch._foreach_sub(weights, average)
        torch._foreach_mul_(change, self._average_weight * finite)
        torch._foreach_add_(average, change)
        return torch.stack([loss, norm])

    def _fastest_step(self, loss_of: Loss, *batch: Tensor | None) -> Callable[..., Tensor]:
        """The step for this loss and batches like this one: over processes, compiled or recorded, where that
        is to be had."""
        if self.device == "cuda":
            pixels = batch[0][:, 0].numel()
            saved = self.total_steps * (SAVED_BY_STEP + SAVED_BY_PIXEL * pixels)
            compiles = saved >= COMPILE_SECONDS  # by the whole run, so that a resumed one decides the same
            print(f"the loss is {'' if compiles else 'not '}compiled: that takes about {COMPILE_SECONDS} "
                  f"seconds, and saves about {saved:.0f} in a run of this length")
            if compiles:
                with self.precision:
                    loss_of = compiled(loss_of, *(x if x is None else x[:self.micro_batch_size] for x in batch))
        self._over_processes = None
        if self.world > 1:
            loss_of = self._over_processes = DistributedDataParallel(LossModule(self.model, loss_of))

        def step(*batch):
            return self._plain_step(loss_of, *batch)
        return recorded(step) if self.device == "cuda" and self.world == 1 else step
