"""What surrounds the training loop: the batches, previews, saving, stopping and resuming. The loss and the
loop itself are in train.ipynb; what a step does to the weights is in training_step.py.

What is equal to what: timesteps, noise and the order of the images are a function of (seed, step), drawn
for the whole batch. On one device a run that was stopped and resumed is bit for bit the one that never
stopped. N processes and parts of batches (`micro_batch_size`) compute the same sums in another order,
equal up to rounding; so is a run on a GPU where the loss is compiled or the network has attention.
Another kind of device, or another precision, draws other numbers.
"""

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from IPython import get_ipython
from IPython.display import DisplayHandle
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm.auto import tqdm

from checkpoint import load_checkpoint, save_checkpoint
from dataset_loader import is_whole
from machine import autocast, hold_signals, rank_and_world
from noise import random_stream
from run_folder import RunFolder, strip_of
from training_step import Loss, TrainingStep

ORDER, DRAWS = 0, 1  # which random stream of a seed: the order of the images, or what a step draws
SAVE_SECONDS, SAVE_SHARE = 120, 0.01  # between two writes of the state; of the time, where a write takes long
FIRST_PREVIEW, PREVIEW_SHARE = 10, 0.04  # seconds; of the time that training takes
YOUNGEST_GUIDE = 50  # steps: a younger average is nearly noise, and pushing away from it ruins a picture
LOG_SECONDS = 30  # between two lines of progress in a file
READ_SECONDS = 0.25  # between two looks at the losses
DIVERGED = 100  # times the loss of the first step: beyond any doubt
GUIDANCE = {True: 1.2, False: 1.5}  # by an early guide, with labels and without: benchmarks/guidance.py


def shuffled_epochs(num_images: int, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
    """The images of each batch from `step` on, (batch_size,) int64: shuffled epochs, one after the other,
    cut into batches that are always full. The rest of an epoch is joined by the beginning of the next.
    """
    def order(epoch):
        return torch.randperm(num_images, generator=random_stream(seed, ORDER, epoch))

    epoch, used = divmod(step * batch_size, num_images)
    left = order(epoch)[used:]
    while True:
        while len(left) < batch_size:
            epoch += 1
            left = torch.cat([left, order(epoch)])
        yield left[:batch_size]
        left = left[batch_size:]


class Run:
    """A training run: its batches, its steps, its files.

        for x0, label in run.batches(preview):
            ...
            run.step(loss_of, x0, noise, t, label)

    model: the network to train, in place. data: has `pixels`, uint8 (N, C, H, W), and `labels`, (N,) or
    None. use_labels: whether batches come with those labels.
    batch_size: images of a step, over all processes. micro_batch_size: at most so many at a time on one
    device, whose gradients add up (None: all of them).
    learning_rate: of AdamW, after a warm-up of a twentieth of the run and before a cosine down to zero.
    num_epochs: how often each image is seen. seed: of the order, the timesteps and the noise.
    save_dir: where `state.pth`, `model.pth` (the averaged weights), `model_guide.pth` (the average early
    in a long run), `preview.png` and `loss.png` go.
    resume: True goes on with the run in save_dir, False begins a new one and sets the old files aside,
    "auto" goes on where there is a run and begins where there is none.
    initial_weights: a checkpoint of the same network to start from. Its guide goes along where it was
    trained on the same images; else the run keeps one of its own.
    precision: see `autocast`. decay: what the average keeps of itself in a step, at most.

    `average` is the averaged network, `losses` the loss of every step, `rng` the random stream of a step.
    Raises ValueError for a bad value, for a resume that does not fit, and where another run is writing in
    save_dir; FileNotFoundError for resume=True without a run; OSError where save_dir cannot be written.
    """

    def __init__(self, model: nn.Module, data, *, batch_size: int, learning_rate: float, num_epochs: int,
                 seed: int, save_dir: str | os.PathLike, resume: bool | str = False,
                 use_labels: bool = False, micro_batch_size: int | None = None,
                 initial_weights: str | os.PathLike | None = None, precision: str = "auto",
                 decay: float = 0.999):
        self.model = model
        self.device = next(model.parameters()).device.type
        self.rank, self.world = rank_and_world()
        batch_size = whole_number("batch_size", batch_size, least=1)
        num_epochs = whole_number("num_epochs", num_epochs, least=1)
        micro_batch_size = whole_number("micro_batch_size", micro_batch_size or batch_size, least=1)
        seed = whole_number("seed", seed, least=0)
        if not isinstance(learning_rate, Real) or not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate {learning_rate!r}: must be a number above 0")
        learning_rate = float(learning_rate)
        if batch_size % self.world:
            raise ValueError(f"batch_size {batch_size}: must be a multiple of the {self.world} processes")
        self.batch_size, self.seed, self.precision = batch_size, seed, autocast(self.device, precision)
        self.num_images, self.total_steps = len(data), math.ceil(num_epochs * len(data) / batch_size)
        self.settings = {
            "batch_size": batch_size, "learning_rate": learning_rate, "num_epochs": num_epochs,
            "seed": seed, "num_images": len(data), "pixels": digest(data.pixels),
            "labels": digest(data.labels) if use_labels else None,
            "precision": "bf16" if self.precision._enabled else "fp32",
            "device": self.device, "initial_weights": initial_weights and str(initial_weights)}
        self.losses, self.seconds, self.previews = [], 0.0, []
        self.folder = RunFolder(save_dir, writes=self.rank == 0)
        self.earlier, self.guide_steps = None, 0  # 0: none yet; None: this run keeps none, see _start_from
        if initial_weights is not None and not (resume and self.folder.state.exists()):
            self._start_from(Path(initial_weights).expanduser())
        self.training_step = TrainingStep(
            model, learning_rate=learning_rate, total_steps=self.total_steps, decay=decay,
            micro_batch_size=micro_batch_size, precision=self.precision)
        self.average = self.training_step.average
        if self._goes_on(resume):
            self._load()
        elif self.rank == 0:
            self.folder.set_old_files_aside()
            if self.guide_steps is None:
                self.folder.copy_guide_of(initial_weights)
        self.rng = torch.Generator(self.device)
        self._pending, self._meet_at = [], 0
        self._pixels, self._labels = data.pixels, data.labels if use_labels else None
        if self.device == "cuda":
            self._copies = torch.cuda.Stream()
            if data.pixels.nbytes < torch.cuda.mem_get_info()[0] / 2:
                self._pixels = data.pixels.to(self.device)
        print(self)

    def __str__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        many = f"{self.world} processes on {self.device}" if self.world > 1 else self.device
        done = f", {self.steps:,} of them done" if self.steps else ""
        return (f"{count:,} weights on {many} in {self.settings['precision']}, {self.total_steps:,} steps "
                f"of {self.batch_size} images{done}")

    @property
    def steps(self) -> int:
        return self.training_step.steps

    @property
    def images_seen(self) -> int:
        return self.steps * self.batch_size

    # The loop

    def batches(self, preview: Callable[[], Image.Image] | None = None,
                ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches from where the run stands to its end: images (B, C, H, W) in [-1, 1], and labels
        (B,) int64 or None. Between steps the files are written and the progress shown.

        preview: draws a picture with `average`; called within a minute, then so that all pictures take
        at most 5 % of the time, and at the end.
        Ctrl-C, Jupyter's Stop, SIGTERM and SIGHUP end the loop at the next look at the losses, with
        all saved: after the step at hand, or after READ_SECONDS where steps are quick.
        """
        self.training_step.begin()
        self._clock = time.perf_counter()
        self._save_at = self._clock + SAVE_SECONDS
        self._preview_at, self._picture = FIRST_PREVIEW, DisplayHandle()
        if get_ipython() and preview:
            self._picture.display("The first preview will be here within a minute.")
        order = shuffled_epochs(self.num_images, self.batch_size, self.seed, self.steps)
        with hold_signals() as stopped, self._progress_bar() as bar:
            while self.steps < self.total_steps:
                seed = random_stream(self.seed, DRAWS, self.steps).initial_seed()
                self.rng.manual_seed(seed)
                torch.manual_seed((seed + self.rank) % 2**63)  # of dropout, where the network has it
                yield self._take_batch(next(order))
                if self.steps >= min(self._meet_at, self.total_steps):
                    if self._meet(stopped(), preview, bar):
                        break
            self._save()
            if self.steps == self.total_steps and preview and self.rank == 0:
                self._show(preview)
                self._save()  # once more, with the last preview
        if self.steps < self.total_steps:
            print(f"stopped after step {self.steps:,} of {self.total_steps:,}; resume=True goes on from "
                  f"{self.folder.state}")
        else:
            print(f"loss {fmean(self.losses[-100:]):.4f} after {self.steps:,} steps and "
                  f"{self.seconds / 60:.1f} minutes; the model is in {self.folder.model}")

    def plot_losses(self) -> plt.Figure:
        """The loss over the images seen, each point the mean of up to a hundred steps."""
        count = len(self.losses)
        window, stride = max(1, min(100, count // 10)), max(1, count // 1000)
        figure, axis = plt.subplots(figsize=(6, 2.5))
        axis.semilogy(torch.arange(window, count + 1, stride) * self.batch_size,
                      torch.tensor(self.losses).unfold(0, window, stride).mean(dim=1))
        axis.set(xlabel="images seen", ylabel="loss (weighted)")
        return figure

    def _progress_bar(self) -> tqdm:
        seen_live = get_ipython() or sys.stderr.isatty()  # else each look is a line in a log
        interval = {} if seen_live else {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS}
        return tqdm(total=self.total_steps * self.batch_size, initial=self.images_seen, unit=" images",
                    unit_scale=True, smoothing=0.1, disable=self.rank > 0, **interval)

    def _take_batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = None if self._labels is None else self._to_device(self._labels[index])
        if self._pixels.device.type == self.device:
            index = self._to_device(index)
        pixels = self._to_device(self._pixels[index]).to(memory_format=torch.channels_last)
        return pixels.float() / 127.5 - 1, labels

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device != "cuda" or tensor.device.type != "cpu":
            return tensor.to(self.device)
        with torch.cuda.stream(self._copies):  # a queue of its own: while the last step goes on
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._copies)
        copy.record_stream(torch.cuda.current_stream())
        return copy

    def step(self, loss_of: Loss, *batch: Tensor | None) -> None:
        """One step of training: gradient, clipped at a norm of 1, AdamW, learning rate, average.

        loss_of(*batch): the mean loss, a function of tensors alone, the images first, each with one entry
        for each image of the whole batch; every process takes its share. A step whose gradient is not
        finite changes nothing, and ends the run at the next look at the losses.
        """
        self._pending.append(self.training_step(loss_of, *batch))

    # Between the steps

    def _meet(self, stopped: bool, preview: Callable | None, bar: tqdm) -> bool:
        """Reads the losses since the last time, on all processes at once, and does what is due; returns
        whether the run is to stop, which is where any process was told to. The first process's clock
        decides when they meet again."""
        values = torch.stack(self._pending)  # (steps, 2)
        norms = values[:, 1].tolist()  # here the host waits for the device
        now, interval = time.perf_counter(), 0
        saves, shows = now > self._save_at, self.seconds >= self._preview_at
        if self.rank == 0:
            interval = max(1, min(500, int(len(values) * READ_SECONDS / (now - self._clock))))
        message = torch.cat([values[:, 0] / self.world, values.new_tensor([stopped, interval])])
        if self.world > 1:
            dist.all_reduce(message)
        *losses, stops, interval = message.tolist()
        self._pending.clear()
        self._check_losses(losses, norms)
        self.losses += losses
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self._meet_at = self.steps + int(interval)
        guide = self.total_steps // 16
        if guide >= YOUNGEST_GUIDE and self.guide_steps is not None:
            if guide <= self.steps <= 2 * guide and not self.guide_steps:  # later it is no early network
                self.guide_steps = self.steps
                self._save_average(self.folder.guide)
            elif self.steps < guide:
                self._meet_at = min(self._meet_at, guide)
        if saves:
            self._save()
        bar.set_postfix(loss=f"{fmean(self.losses[-100:]):.4f}", refresh=False)
        bar.update(self.images_seen - bar.n)
        if shows and preview and self.rank == 0:
            self._show(preview)
        return stops > 0

    def _check_losses(self, losses: list[float], norms: list[float]) -> None:
        """Raises FloatingPointError where a gradient was not finite or the loss has grown out of bounds."""
        at = f"learning_rate {self.settings['learning_rate']:g}"
        unchanged = "" if self.device == "mps" else "this step changed no weight, and "
        remedy = "start again with a lower learning_rate"
        for step, norm in enumerate(norms, start=len(self.losses) + 1):
            if not math.isfinite(norm):
                raise FloatingPointError(f"step {step}: the gradient is not finite at {at}; {unchanged}"
                                         f"nothing was saved since; {remedy}")
        losses = self.losses + losses
        mean = fmean(losses[-20:])
        if mean > DIVERGED * losses[0]:
            raise FloatingPointError(f"step {len(losses)}: the loss has grown to {mean:.3g} at {at}, from "
                                     f"{losses[0]:.3g}; the files are those of the last save; {remedy}")

    def _show(self, preview: Callable[[], Image.Image]) -> None:
        """Adds a picture to the strip of previews, shows the strip and writes it."""
        def show_strip():
            previews = self.previews
            if not previews or previews[-1][0] < self.images_seen:
                previews = [*previews, (self.images_seen, preview())]
            strip = strip_of(previews)
            self.previews = previews  # where no error came
            if get_ipython():  # elsewhere the file is all there is to see
                self._picture.update(strip)
            return strip
        start = time.perf_counter()
        self.folder.write_figure("preview.png", show_strip)
        self._clock = time.perf_counter()
        cost = self._clock - start
        self.seconds += cost
        self._preview_at = max(1.4 * self.seconds, self.seconds + cost / PREVIEW_SHARE)

    # The files

    def _start_from(self, path: Path) -> None:
        """Loads initial weights. On the same images their guide goes along (guide_steps None), since this
        run's own would be no early network."""
        if path.resolve() == self.folder.model.resolve():
            raise ValueError(f"initial_weights {path}: this run would write over it; choose another "
                             "save_dir")
        metadata, state = self.model.metadata, load_checkpoint(path, self.device)
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"initial_weights {path}: not the weights of this network; pass a model that "
                             "train.ipynb wrote with the same network") from error
        theirs = self.model.metadata.get("noise_schedule")
        if theirs != metadata.get("noise_schedule"):
            raise ValueError(f"noise_schedule: {path} has {theirs}, this run has "
                             f"{metadata.get('noise_schedule')}; set num_timesteps to the checkpoint's")
        classes = self.model.metadata.get("classes", [])
        if classes != metadata.get("classes", []):
            print(f"{path} was trained on the classes {', '.join(classes)}; here they begin as "
                  f"{', '.join(metadata.get('classes', []))}")
        self.earlier = self.model.metadata.get("training")
        self.model.metadata = metadata
        if (self.earlier or {}).get("pixels") == self.settings["pixels"]:
            self.guide_steps = None

    def _goes_on(self, resume: bool | str) -> bool:
        """Whether to go on with the run in save_dir: where asked to, or where torchrun restarted the
        processes of a job that had begun it (for a replaced machine ask for resume="auto")."""
        if resume not in (True, False, "auto"):
            raise ValueError(f"resume {resume!r}: must be True, False or 'auto'")
        self.job = os.environ.get("TORCHELASTIC_RUN_ID")
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        exists = self.folder.state.exists()
        ours = exists and restarted and load_checkpoint(self.folder.state).get("job") == self.job
        goes_on = (exists if resume == "auto" else bool(resume)) or ours
        if self.world == 1:
            return goes_on
        flag = torch.tensor(float(goes_on and self.rank == 0), device=self.device)
        dist.all_reduce(flag)  # the first process decides
        return flag.item() > 0

    def _load(self) -> None:
        settings = self.settings | self._described()
        state = self.folder.read_state(self.training_step.parts(), settings, self.device)
        self.losses = state["losses"].tolist()
        self.training_step.load(state, len(self.losses))
        self.seconds, self.earlier = state["seconds"], state["earlier"]
        self.guide_steps = state["guide_steps"]
        self.previews = [(seen, to_pil_image(picture)) for seen, picture in state["previews"]]
        self.settings["initial_weights"] = state["settings"].get("initial_weights")

    def _described(self) -> dict:
        """What the checkpoint says of the network's task, which must stay the same in one run."""
        return {name: self.model.metadata.get(name) for name in ("noise_schedule", "classes")}

    def _save(self) -> None:
        """Writes the state, from which resume goes on, and then the averaged weights made of it."""
        start = time.perf_counter()
        if self.rank == 0:
            state = {"settings": self.settings | self._described(), "losses": torch.tensor(self.losses),
                     "seconds": self.seconds, "earlier": self.earlier, "job": self.job,
                     "guide_steps": self.guide_steps,
                     "previews": [(seen, pil_to_tensor(image)) for seen, image in self.previews]}
            parts = {name: part.state_dict() for name, part in self.training_step.parts().items()}
            save_checkpoint(state | parts, self.folder.state)
            self._save_average(self.folder.model)
            self.folder.write_figure("loss.png", self.plot_losses)
        now = time.perf_counter()
        self._save_at = now + max(SAVE_SECONDS, (now - start) / SAVE_SHARE)

    def _save_average(self, path: Path) -> None:
        self.average.metadata = self.model.metadata | {
            "guidance": GUIDANCE[self._labels is not None] if self.folder.guide.exists() else 1.0,
            "training": self.settings | {"steps": self.steps, "images_seen": self.images_seen,
                                         "seconds": round(self.seconds), "earlier": self.earlier}}
        if self.rank == 0:
            save_checkpoint(self.average.state_dict(), path)


def whole_number(name: str, value: Integral, least: int) -> int:
    """The value as Python's own int, perhaps of numpy's. Raises ValueError for anything else."""
    if not is_whole(value, least):
        raise ValueError(f"{name} {value!r}: must be a whole number of at least {least}")
    return int(value)


def digest(values: Tensor) -> str:
    """A short name for pixels or labels: the same for the same images, wherever they lie."""
    return hashlib.blake2b(values.contiguous().numpy(), digest_size=8).hexdigest()
