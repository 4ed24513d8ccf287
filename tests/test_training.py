"""What surrounds the loop: the step, the stream of batches, the files of a run."""

import ast
import errno
import math
import os
import re
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import machine
import recorded as recorded_module
import training
import training_step
from checkpoint import load_checkpoint, save_checkpoint
from dataset_loader import ImageDataset
from machine import autocast, hold_signals
from model import U_net
from recorded import compiled, recorded
from training import Run, shuffled_epochs

IMAGES, CLASSES = 40, 2


class Data:
    """Noise that has a label."""

    def __init__(self, count=IMAGES, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=rng)
        self.labels = torch.arange(count) % CLASSES

    def __len__(self):
        return len(self.pixels)


def run_in(folder, data=None, network=None, metadata=None, **arguments):
    """A run of ten steps of eight images, unless other arguments say otherwise."""
    torch.manual_seed(0)
    model = U_net(t_dim=8, widths=(8,), num_classes=CLASSES, **network or {})
    model.metadata = {"image_size": 8, "noise_schedule": {"num_timesteps": 100},
                      "classes": ["0", "1"]} | (metadata or {})
    defaults = dict(batch_size=8, learning_rate=1e-3, num_epochs=2, seed=0, precision="fp32",
                    use_labels=True)
    return Run(model, data or Data(), save_dir=folder, **defaults | arguments)


def loss_by(run):
    def loss_of(x0, noise, label):
        t = torch.full((len(x0),), 50)
        return (run.model(x0 + noise, t, label) - noise).square().mean()
    return loss_of


def train(run, until=None, preview=None, each=lambda run: None):
    """Trains to the end, or until the signal of Jupyter's Stop comes before a step is taken."""
    loss_of = loss_by(run)
    for x0, label in run.batches(preview):
        if run.steps + 1 == until:
            run._meet_at = 0  # look at once
            signal.raise_signal(signal.SIGINT)
        run.step(loss_of, x0, torch.randn(x0.shape, generator=run.rng), label)
        each(run)
    return run


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


# The batches

@pytest.mark.parametrize("num_images, batch_size", [(10, 4), (10, 5), (3, 8), (7, 7), (5, 1)])
def test_batches_are_full_and_every_epoch_has_each_image_once(num_images, batch_size):
    stream = shuffled_epochs(num_images, batch_size, seed=0, step=0)
    batches = [next(stream) for _ in range(3 * num_images)]
    assert all(len(batch) == batch_size for batch in batches)
    epochs = torch.cat(batches).split(num_images)
    assert len(epochs) == 3 * batch_size
    assert all(epoch.sort().values.tolist() == list(range(num_images)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1 or num_images == 1
    for step in (1, 2, 5):
        assert torch.equal(next(shuffled_epochs(num_images, batch_size, 0, step)), batches[step])


def test_batches_are_images_in_minus_one_to_one_with_their_labels(tmp_path):
    run, seen = run_in(tmp_path, num_epochs=1), []
    for x0, label in run.batches():
        seen += [(round((x.item() + 1) * 127.5), one.item()) for x, one in zip(x0[:, 0, 0, 0], label)]
        run.step(loss_by(run), x0, torch.zeros_like(x0), label)
    expected = zip(Data().pixels[:, 0, 0, 0].tolist(), Data().labels.tolist())
    assert sorted(seen) == sorted(expected)


# The step

def test_a_step_is_adamw_on_a_gradient_of_norm_1_and_the_average_follows(tmp_path):
    """Against torch.optim.AdamW by hand, with another way to clip, average and fall."""
    run = run_in(tmp_path, num_epochs=8)  # 40 steps
    twin, average = [p.detach().clone().requires_grad_() for p in run.model.parameters()], weights(run.model)
    optimizer, names = torch.optim.AdamW(twin, fused=False), [n for n, _ in run.model.named_parameters()]
    for x0, label in run.batches():
        noise, step = 30 * torch.randn(x0.shape, generator=run.rng), run.steps  # of a large gradient
        run.step(loss_by(run), x0, noise, label)

        prediction = torch.func.functional_call(run.model, dict(zip(names, twin)),
                                                (x0 + noise, torch.full((8,), 50), label))
        loss = (prediction - noise).square().mean()
        gradient = torch.autograd.grad(loss, twin)
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        assert norm > 1
        for parameter, g in zip(twin, gradient):
            parameter.grad = g / norm
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 2) * (
            1 + math.cos(math.pi * step / 40)) / 2
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * torch.cat([p.detach().flatten() for p in twin])
        if run.steps == 5:
            break
    torch.testing.assert_close(weights(run.model), torch.cat([p.flatten() for p in twin]).detach(),
                               rtol=0, atol=2e-5)
    torch.testing.assert_close(weights(run.average), average, rtol=0, atol=2e-5)


def test_a_short_gradient_is_not_made_longer(tmp_path):
    run = run_in(tmp_path)
    loss_of = loss_by(run)
    x0, label = next(run.batches())
    run.step(lambda *batch: 1e-4 * loss_of(*batch), x0, torch.randn(x0.shape, generator=run.rng), label)
    (_, norm), = [pending.tolist() for pending in run._pending]
    found = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()
    assert 0 < norm < 1 and found == pytest.approx(norm, rel=1e-4)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    whole, parts = (run_in(tmp_path / str(size), micro_batch_size=size) for size in (None, 3))
    for run in (whole, parts):
        run.training_step.optimizer = torch.optim.SGD(run.model.parameters(), 0.1, fused=True)
    with pytest.warns(UserWarning, match="lr_scheduler"):  # of the optimizer that is gone
        train(whole)
    train(parts)
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=0, atol=1e-6)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing_and_ends_the_run(tmp_path):
    run = run_in(tmp_path)
    loss_of, kept = loss_by(run), []

    def breaks(*batch):
        return loss_of(*batch) * (math.nan if run.steps == 3 else 1)
    with pytest.raises(FloatingPointError, match="step 4: the gradient is not finite at learning_rate 0.001"):
        for x0, label in run.batches():
            if run.steps == 3:
                kept = [weights(run.model), weights(run.average)]
                run._meet_at = 0
            run.step(breaks, x0, torch.randn(x0.shape, generator=run.rng), label)
    assert torch.equal(weights(run.model), kept[0]) and torch.equal(weights(run.average), kept[1])
    moments = run.training_step.optimizer.state.values()
    assert all(m["exp_avg"].isfinite().all() and m["step"] == 3 for m in moments)


def test_a_loss_that_grows_out_of_bounds_ends_the_run_and_keeps_the_last_good_files(tmp_path, monkeypatch):
    train(run_in(tmp_path))
    clock = Clock(monkeypatch, step=200.0)  # so a save is due at each look, that of the error too
    before = (tmp_path / "model.pth").read_bytes()
    run = run_in(tmp_path, resume=True, num_epochs=400)
    loss_of = loss_by(run)
    with pytest.raises(FloatingPointError, match="the loss has grown to .* start again with a lower"):
        for x0, label in run.batches():
            run.step(lambda *batch: 1e6 * loss_of(*batch), x0, torch.randn(x0.shape), label)
            clock.tick(run)
    assert (tmp_path / "model.pth").read_bytes() == before
    assert run_in(tmp_path, resume=True, num_epochs=400).steps == 10


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes"),  # on Windows
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),  # Intel's
    RuntimeError("Invalid buffer size: 9.02 GB")])  # Apple's
def test_a_full_memory_says_what_to_lower(tmp_path, error):
    run, held = run_in(tmp_path, micro_batch_size=4), []

    def too_large(*_):
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise error
    with pytest.raises(MemoryError, match="4 images at once .*; set micro_batch_size below 4") as raised:
        run.step(too_large, torch.zeros(8, 1, 8, 8))
    assert raised.value.__cause__ is error  # which a notebook keeps, and once kept all that the step held
    assert held[0]() is None
    error_of_ours = RuntimeError("shapes differ")

    def wrong(*_):
        raise error_of_ours
    with pytest.raises(RuntimeError, match="shapes differ"):
        run.step(wrong, torch.zeros(8, 1, 8, 8))


# Stop and go on

@pytest.mark.parametrize("network", [{}, {"dropout": 0.2}])
def test_a_run_that_was_stopped_and_resumed_is_the_one_that_never_stopped(tmp_path, capsys, network):
    whole = train(run_in(tmp_path / "whole", network=network))
    train(run_in(tmp_path / "parts", network=network), until=3)
    assert "stopped after step 3 of 10; resume=True goes on from" in capsys.readouterr().out
    train(run_in(tmp_path / "parts", network=network, resume=True), until=7)
    parts = train(run_in(tmp_path / "parts", network=network, resume="auto"))
    assert parts.losses == whole.losses and len(whole.losses) == 10
    for one, other in ((parts.model, whole.model), (parts.average, whole.average)):
        assert torch.equal(weights(one), weights(other))
    one, other = (run.training_step.optimizer.state.values() for run in (parts, whole))
    for one, other in zip(one, other):
        assert all(torch.equal(one[name], other[name]) for name in one)
    saved = [U_net.from_checkpoint(tmp_path / name / "model.pth") for name in ("whole", "parts")]
    assert torch.equal(*map(weights, saved)) and torch.equal(weights(saved[0]), weights(whole.average))


def test_resume_needs_the_same_run_by_meaning(tmp_path):
    train(run_in(tmp_path))
    names, swapped = ["0", "1"], Data()
    swapped.labels = 1 - swapped.labels
    for change, message in (({"learning_rate": 0.5}, "learning_rate: the run in .* has 0.001, .* has 0.5"),
                            ({"batch_size": 4}, "batch_size"), ({"seed": 1}, "seed"),
                            ({"data": Data(seed=1)}, "the run in .* has seen other images; resume"),
                            ({"data": Data(39)}, "num_images: .* has 40, this one has 39"),
                            ({"data": swapped}, "the run in .* has seen other labels; resume"),
                            ({"metadata": {"noise_schedule": {"num_timesteps": 400}, "classes": names}},
                             "noise_schedule: the run in .* has {'num_timesteps': 100}, this one has "),
                            ({"metadata": {"noise_schedule": {"num_timesteps": 100}, "classes": ["1", "0"]}},
                             "classes: the run in .* has .'0', '1'., this one has .'1', '0'.; resume"),
                            ({"precision": "bf16"}, "precision: the run in .* has 'fp32', this one has 'bf16'"),
                            ({"use_labels": False}, "the run in .* has seen other labels")):
        with pytest.raises(ValueError, match=message):
            run_in(tmp_path, resume=True, **change)
    with pytest.raises(ValueError, match="blocks: the checkpoint has 1, this network has 2"):
        run_in(tmp_path, resume=True, network={"blocks": 2})
    with pytest.raises(FileNotFoundError, match="state.pth: no such checkpoint"):
        run_in(tmp_path / "empty", resume=True)
    assert run_in(tmp_path / "empty", resume="auto").steps == 0
    with pytest.raises(ValueError, match="resume 'yes': must be True, False or 'auto'"):
        run_in(tmp_path, resume="yes")
    save_checkpoint({"epoch": 1}, tmp_path / "empty" / "state.pth")
    with pytest.raises(ValueError, match="not the state of a run of this version, it has no average"):
        run_in(tmp_path / "empty", resume=True)


def test_a_finished_run_trains_on_with_more_epochs(tmp_path):
    train(run_in(tmp_path))
    run = train(run_in(tmp_path, resume=True, num_epochs=3))
    assert run.steps == 15
    saved = U_net.from_checkpoint(tmp_path / "model.pth").metadata["training"]
    assert (saved["num_epochs"], saved["steps"], saved["images_seen"]) == (3, 15, 120)


def test_the_learning_rate_of_a_finished_run_is_no_longer_zero_where_it_goes_on(tmp_path):
    train(run_in(tmp_path))
    run, used = run_in(tmp_path, resume=True, num_epochs=4), []
    loss_of = loss_by(run)
    for x0, label in run.batches():
        used.append(run.training_step.optimizer.param_groups[0]["lr"].item())
        run.step(loss_of, x0, torch.randn(x0.shape), label)
    expected = [1e-3 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(10, 20)]
    assert used == pytest.approx(expected)


def test_a_run_that_is_longer_than_asked_for_is_left_as_it_is(tmp_path, capsys):
    before = weights(train(run_in(tmp_path)).average)
    run = train(run_in(tmp_path, resume=True, num_epochs=1))
    assert run.steps == 10 and torch.equal(weights(run.average), before)
    assert "5 steps of 8 images, 10 of them done" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["settings", "losses", "seconds", "earlier", "guide_steps", "model",
                                 "average", "optimizer", "lr_schedule"])
def test_a_state_without_something_says_what(tmp_path, key):
    train(run_in(tmp_path))
    state = load_checkpoint(tmp_path / "state.pth")
    del state[key]
    save_checkpoint(state, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=f"state.pth: not the state of a run of this version, .* no {key}; "):
        run_in(tmp_path, resume=True)


def test_a_folder_may_be_spelled_otherwise_or_move_and_the_images_may_not_change(tmp_path, monkeypatch):
    """As pixels of a folder of images, by its name, by another, and after it moved."""
    rng = np.random.default_rng(0)

    def paint(folder):
        folder.mkdir(exist_ok=True)
        for i in range(IMAGES):
            Image.fromarray(rng.integers(256, size=(8, 8), dtype=np.uint8)).save(folder / f"{i}.png")

    def goes_on(path, size=8):
        data = ImageDataset(path, size)
        return run_in(tmp_path / "run", data, resume=True, use_labels=False).steps == 10
    paint(tmp_path / "pink")
    monkeypatch.chdir(tmp_path)
    train(run_in(tmp_path / "run", ImageDataset("pink", 8), use_labels=False))
    for path, size in (("pink/", 8), ("./pink", [8, 8]), (tmp_path / "pink", (8, 8))):
        assert goes_on(path, size)
    assert run_in("run/", ImageDataset("pink", 8), resume=True, use_labels=False).steps == 10
    (tmp_path / "pink").rename(tmp_path / "moved")
    assert goes_on("moved")
    paint(tmp_path / "moved")  # the same names, all pictures replaced
    with pytest.raises(ValueError, match="has seen other images"):
        goes_on("moved")


def test_a_restarted_job_goes_on_with_its_own_run_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    train(run_in(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_in(tmp_path).steps == 10
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert run_in(tmp_path).steps == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_waits_and_the_second_acts(name):
    if not hasattr(signal, name):
        pytest.skip("Windows has no SIGHUP")
    number, caught = getattr(signal, name), []
    before = signal.signal(number, lambda *_: caught.append(True))
    try:
        with hold_signals() as stopped:
            assert not stopped()
            signal.raise_signal(number)
            assert stopped() and not caught
            signal.raise_signal(number)
            assert caught
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP under nohup: a lost connection must not stop the run."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with hold_signals() as stopped:
            signal.raise_signal(signal.SIGTERM)
            assert not stopped()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_that_a_system_lacks_or_that_are_not_of_python_are_left_out(monkeypatch):
    """As on Windows, which has no SIGHUP; and in a program whose handler is written in C."""
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with hold_signals() as stopped:
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
    assert signal.getsignal(signal.SIGTERM) == before
    set_handler = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_handler(number, handler) and None)
    with hold_signals() as stopped:
        assert not stopped()
    set_handler(signal.SIGTERM, before)
    set_handler(signal.SIGINT, signal.default_int_handler)


def test_outside_the_main_thread_a_run_trains_without_holding_signals(tmp_path):
    run = run_in(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, run).result().steps == 10


# The files

def test_the_loss_is_kept_as_a_picture_also_where_the_run_ends_in_an_error(tmp_path, monkeypatch):
    clock, run = Clock(monkeypatch, step=70.0), run_in(tmp_path, num_epochs=800)

    def fails_late(run):
        clock.tick(run)
        if run.steps == 60:
            raise RuntimeError("late")
    with pytest.raises(RuntimeError, match="late"):
        train(run, each=fails_late)
    assert Image.open(tmp_path / "loss.png").size > (300, 100)
    (axis,) = run.plot_losses().axes
    (line,) = axis.lines
    seen, curve = line.get_data()
    count = len(run.losses)
    assert 50 <= count <= 60 and (seen[-1], axis.get_yscale()) == (8 * count, "log")
    window = count // 10
    assert curve[-1] == pytest.approx(sum(run.losses[-window:]) / window, rel=1e-5)
    run.losses = [1.0] * 123_456
    (line,) = run.plot_losses().axes[0].lines
    assert 500 < len(line.get_xdata()) < 2000  # quick to draw, whatever the length
    plt.close("all")


def test_a_picture_of_the_loss_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    before = plt.get_fignums()
    assert train(run_in(tmp_path)).steps == 10
    assert "loss.png was not written: [Errno 28]" in capsys.readouterr().out
    assert (tmp_path / "model.pth").exists() and plt.get_fignums() == before


def test_progress_in_a_log_is_a_line_in_half_a_minute(tmp_path, monkeypatch, capsys):
    """On a clock by which each of 200 steps takes a second. tqdm's own thread looks at the machine's clock, and sees
    nothing here."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    monkeypatch.setattr("tqdm._monitor.TMonitor.get_instances", lambda self: [])
    run = run_in(tmp_path, num_epochs=40)
    bar = run._progress_bar()
    assert bar.maxinterval == bar.mininterval == 30
    bar.close()
    capsys.readouterr()
    train(run, each=lambda run: (clock.tick(run), setattr(run, "_meet_at", 0)))
    assert 6 <= capsys.readouterr().err.count("images/s") <= 9


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_share_losses_and_stops_and_the_first_one_says_when_they_meet_again(tmp_path, monkeypatch, rank):
    clock, run, sent = Clock(monkeypatch), run_in(tmp_path), []
    run.rank, run.world, run._clock, run._save_at, run._preview_at = rank, 2, 0.0, math.inf, math.inf
    run._pending = [torch.tensor([loss, 1.0]) for loss in (2.0, 6.0)]
    clock.now = 0.1  # for two steps: so five in the quarter of a second to the next look

    def add_the_other(message):
        sent.append(message.tolist())
        message += torch.tensor([3.0, 1.0, 0.0, 7.0 * rank])
    monkeypatch.setattr(training.dist, "all_reduce", add_the_other)
    with run._progress_bar() as bar:
        assert not run._meet(False, None, bar)
        assert sent == [[1.0, 3.0, 0.0, 0.0 if rank else 5.0]]
        assert run.losses == [4.0, 4.0] and run._meet_at == (7 if rank else 5)
        run._pending = [torch.tensor([1.0, 1.0])] * 2
        clock.now += 0.1
        assert run._meet(True, None, bar) and sent[1][2] == 1


def test_a_new_run_sets_the_old_files_aside(tmp_path):
    train(run_in(tmp_path), preview=lambda: Image.new("L", (8, 8)))
    (tmp_path / "model_guide.pth").write_bytes(b"no guide of the new run")
    before = (tmp_path / "model.pth").read_bytes()
    train(run_in(tmp_path, seed=1))
    (aside,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert sorted(os.listdir(aside)) == ["loss.png", "model.pth", "model_guide.pth", "preview.png", "state.pth"]
    assert (aside / "model.pth").read_bytes() == before
    assert (tmp_path / "model.pth").read_bytes() != before
    assert U_net.from_checkpoint(tmp_path / "model.pth").metadata["guidance"] == 1


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    tmp_path.joinpath("run").mkdir()
    other = FileLock(tmp_path / "run" / ".lock")  # not the run's own object: another process's
    with other, pytest.raises(ValueError, match="save_dir .*run: another run is writing there"):
        run_in(tmp_path / "run")
    run = run_in(tmp_path / "run")
    with pytest.raises(Timeout):
        other.acquire(timeout=0)
    run = run_in(tmp_path / "run")  # the same process may begin again, as when a cell is run twice
    with pytest.raises(Timeout):
        other.acquire(timeout=0)
    del run


def test_two_old_runs_of_the_same_second_are_both_kept(tmp_path):
    for seed in (0, 1, 2):
        run = train(run_in(tmp_path, seed=seed))
        for path in (run.folder.model, run.folder.state):
            os.utime(path, (1e9, 1e9))
        for name in ("loss.png", "preview.png"):
            (tmp_path / name).unlink(missing_ok=True)
    asides = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(asides) == 2
    assert {load_checkpoint(aside / "state.pth")["settings"]["seed"] for aside in asides} == {0, 1}


@pytest.mark.parametrize("number, locks", [(errno.EOPNOTSUPP, False), (errno.ENOLCK, False),
                                           (errno.EACCES, True), (errno.EROFS, True)])
def test_a_disk_without_locks_is_said_and_one_that_cannot_be_written_ends_it(tmp_path, monkeypatch, capsys,
                                                                             number, locks):
    def refuse(self):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(FileLock, "acquire", refuse)
    if locks:
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            run_in(tmp_path)
    else:
        assert train(run_in(tmp_path)).steps == 10
        assert "is on a disk without locks: start no second run in it" in capsys.readouterr().out


def test_no_module_uses_what_one_system_alone_has():
    """Attributes of `os` and `signal`: those of the list exist on Windows as well. No module of Unix alone."""
    everywhere = {"environ", "chdir", "path", "PathLike", "name", "sep", "replace", "open", "close", "fsync", "devnull",
                  "walk", "stat", "makedirs", "O_RDONLY", "signal", "SIG_DFL", "SIG_IGN", "getsignal", "getcwd", "fspath",
                  "_exit"}
    used = set()
    for path in Path(training.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        modules = [name for name in ("os", "signal") if f"import {name}\n" in text]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in modules:
                used.add(node.attr)
            if isinstance(node, ast.ImportFrom) and node.module in ("os", "signal"):
                used |= {alias.name for alias in node.names}
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"fcntl", "grp", "pwd", "resource", "termios"}, path
    assert "replace" in used and used <= everywhere


def test_a_folder_that_cannot_be_made_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        run_in(tmp_path / "file")


class Clock:
    """A clock on which every step takes a given time, and a preview another."""

    def __init__(self, monkeypatch, step=1.0):
        self.now, self.step = 0.0, step
        monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def tick(self, run):
        self.now += self.step


def test_state_is_saved_by_the_clock_and_previews_take_a_twentieth_of_the_time(tmp_path, monkeypatch):
    clock, saves, shows = Clock(monkeypatch, step=5.0), [], []
    run = run_in(tmp_path, num_epochs=160)  # 800 steps, 4000 seconds
    monkeypatch.setattr(training, "save_checkpoint", lambda state, path: saves.append(clock.now))
    monkeypatch.setattr(run, "plot_losses", plt.figure)  # which is quicker

    def preview():
        shows.append(clock.now)
        clock.now += 5
        return Image.new("L", (8, 8))
    train(run, preview=preview, each=clock.tick)
    gaps = [b - a for a, b in zip([0, *saves], saves)]
    assert max(gaps) <= 300 and len(saves) <= 2 * 4000 / 100
    assert shows[0] <= 60 and len(shows) >= 5
    assert all(5 * i <= 0.05 * at for i, at in enumerate(shows[1:], start=1))
    assert (tmp_path / "preview.png").exists()


def test_files_on_a_slow_disk_are_written_less_often(tmp_path, monkeypatch):
    clock, writes = Clock(monkeypatch, step=20.0), []

    def write(state, path):
        writes.append(clock.now)
        clock.now += 10
    run = run_in(tmp_path, num_epochs=100)  # 500 steps, 10,000 seconds
    monkeypatch.setattr(training, "save_checkpoint", write)
    train(run, each=clock.tick)
    assert 4 <= len(writes) and 10 * len(writes) <= 0.02 * clock.now + 40  # 40: at the end, and of the guide


def test_the_strip_of_previews_grows_on_in_a_resumed_run(tmp_path, monkeypatch):
    clock, drawn = Clock(monkeypatch, step=30.0), []

    def preview():
        drawn.append(Image.new("RGB", (8, 8), (40 * len(drawn), 7, 0)))
        return drawn[-1]
    train(run_in(tmp_path, num_epochs=4), until=12, preview=preview, each=clock.tick)
    before = len(drawn)
    train(run_in(tmp_path, num_epochs=4, resume=True), preview=preview, each=clock.tick)
    assert 1 <= before < len(drawn)
    run = run_in(tmp_path, num_epochs=5, resume=True)  # grows on from a finished one as well
    assert len(run.previews) == len(drawn)
    for (seen, picture), one in zip(run.previews, drawn):
        assert picture.tobytes() == one.tobytes()
    assert [seen for seen, _ in run.previews] == sorted({seen for seen, _ in run.previews})


def test_a_preview_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch, step=30.0)

    def preview():
        raise OSError(28, "No space left on device")
    run = train(run_in(tmp_path), preview=preview, each=clock.tick)
    assert run.steps == 10 and "preview.png was not written" in capsys.readouterr().out
    run = train(run_in(tmp_path, num_epochs=4), preview=lambda: None, each=clock.tick)
    assert run.steps == 20 and "preview.png was not written" in capsys.readouterr().out


def test_a_long_run_keeps_its_average_after_a_sixteenth_as_a_guide_and_a_short_one_none(tmp_path):
    seen = {}
    run = run_in(tmp_path / "long", num_epochs=16 * training.YOUNGEST_GUIDE // 5)
    train(run, each=lambda run: seen.update({run.steps: weights(run.average)}))
    guide = U_net.from_checkpoint(tmp_path / "long" / "model_guide.pth")
    assert guide.metadata["training"]["steps"] == training.YOUNGEST_GUIDE
    assert torch.equal(weights(guide), seen[training.YOUNGEST_GUIDE])
    assert U_net.from_checkpoint(tmp_path / "long" / "model.pth").metadata["guidance"] == 1.2
    train(run_in(tmp_path / "short"))
    assert not (tmp_path / "short" / "model_guide.pth").exists()
    assert U_net.from_checkpoint(tmp_path / "short" / "model.pth").metadata["guidance"] == 1


def test_a_run_that_grows_long_when_its_sixteenth_is_past_keeps_no_guide(tmp_path):
    train(run_in(tmp_path, num_epochs=140))
    train(run_in(tmp_path, num_epochs=160, resume=True))
    assert not (tmp_path / "model_guide.pth").exists()
    assert U_net.from_checkpoint(tmp_path / "model.pth").metadata["guidance"] == 1


def test_a_run_starts_from_initial_weights_and_takes_their_guide_along(tmp_path, capsys):
    start = tmp_path / "start.pth"
    first = train(run_in(tmp_path / "first"))
    save_checkpoint(first.average.state_dict(), start)
    run = run_in(tmp_path / "second", initial_weights=start)
    assert torch.equal(weights(run.model), weights(first.average))
    train(run)
    training_of = U_net.from_checkpoint(tmp_path / "second" / "model.pth").metadata["training"]
    assert training_of["earlier"]["steps"] == 10 and training_of["initial_weights"] == str(start)
    assert not (tmp_path / "second" / "model_guide.pth").exists()

    (tmp_path / "start_guide.pth").write_bytes(start.read_bytes())
    long = dict(initial_weights=start, num_epochs=160)  # long enough for a guide of its own
    train(run_in(tmp_path / "third", **long))
    assert (tmp_path / "third" / "model_guide.pth").read_bytes() == start.read_bytes()
    assert "classes" not in capsys.readouterr().out
    start.unlink()  # its state is all that the run needs now
    assert run_in(tmp_path / "third", resume=True, **long).steps == 800


def test_initial_weights_of_other_images_leave_their_guide_behind(tmp_path, capsys):
    start, old_guide = tmp_path / "start.pth", tmp_path / "start_guide.pth"
    save_checkpoint(train(run_in(tmp_path / "first")).average.state_dict(), start)
    old_guide.write_bytes(start.read_bytes())
    others = {"data": Data(seed=1), "metadata": {"classes": ["1", "2"]}, "initial_weights": start}
    train(run_in(tmp_path / "short", **others))
    assert "was trained on the classes 0, 1; here they begin as 1, 2" in capsys.readouterr().out
    assert not (tmp_path / "short" / "model_guide.pth").exists()
    assert U_net.from_checkpoint(tmp_path / "short" / "model.pth").metadata["guidance"] == 1
    train(run_in(tmp_path / "long", num_epochs=160, use_labels=False, **others))  # for a guide of its own
    guide = U_net.from_checkpoint(tmp_path / "long" / "model_guide.pth")
    assert guide.metadata["training"]["steps"] == 50
    assert U_net.from_checkpoint(tmp_path / "long" / "model.pth").metadata["guidance"] == 1.5  # without labels


def test_initial_weights_of_something_else_are_refused(tmp_path):
    train(run_in(tmp_path))
    with pytest.raises(ValueError, match="initial_weights .*model.pth: this run would write over it"):
        run_in(tmp_path, initial_weights=tmp_path / "model.pth")
    with pytest.raises(ValueError, match="initial_weights .*state.pth: not the weights of this network"):
        run_in(tmp_path / "other", initial_weights=tmp_path / "state.pth")
    state = load_checkpoint(tmp_path / "model.pth")
    state["_extra_state"]["noise_schedule"] = {"num_timesteps": 7}
    save_checkpoint(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="noise_schedule: .*other.pth has .*7.* this run has .*100"):
        run_in(tmp_path / "new", initial_weights=tmp_path / "other.pth")


@pytest.mark.parametrize("arguments, message", [
    ({"batch_size": 0}, "batch_size 0"), ({"num_epochs": 1.5}, "num_epochs 1.5"), ({"seed": -1}, "seed -1"),
    ({"learning_rate": "1e-4"}, "learning_rate '1e-4'"), ({"learning_rate": math.nan}, "learning_rate nan"),
    ({"micro_batch_size": -2}, "micro_batch_size -2"), ({"precision": "fp16"}, "precision 'fp16'")])
def test_bad_values_are_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_in(tmp_path, **arguments)


def test_numbers_of_numpy_count_as_numbers(tmp_path):
    run = run_in(tmp_path, batch_size=np.int64(8), num_epochs=np.int32(2), seed=np.uint8(0),
                 learning_rate=np.float64(1e-3), micro_batch_size=np.int64(8))
    assert train(run).losses == train(run_in(tmp_path / "plain", micro_batch_size=8)).losses
    assert run_in(tmp_path, resume=True).steps == 10  # a state that plain numbers go on from


def test_a_batch_of_more_images_than_there_are_shows_each_as_often_as_asked(tmp_path):
    run, seen = run_in(tmp_path, Data(3), batch_size=8, num_epochs=8, use_labels=False), torch.zeros(3)
    for x0, _ in run.batches():
        pixels = ((x0 + 1) * 127.5).round().to(torch.uint8)
        seen += (pixels[:, None] == run._pixels).all(dim=(2, 3, 4)).sum(dim=0)
        run.step(loss_by(run), x0, torch.zeros_like(x0), None)
    assert seen.tolist() == [8, 8, 8]


# Device and precision

@pytest.mark.parametrize("has, expected", [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True),
                                           ({"avx2": True}, False)])
def test_bf16_is_chosen_by_what_the_processor_is(monkeypatch, has, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has, raising=False)
    with autocast("cpu", "auto"):
        assert torch.is_autocast_enabled("cpu") == expected
    for name in ("bf16", "fp32"):
        with autocast("cpu", name):
            assert torch.is_autocast_enabled("cpu") == (name == "bf16")


def losses_on_gpu(folder, until=None, **arguments):
    """The losses of a run of twenty steps on the GPU, or of as many as there are before it is stopped."""
    torch.manual_seed(0)
    model = U_net("cuda", t_dim=8, widths=(8,), num_classes=CLASSES)
    run = Run(model, Data(), batch_size=8, learning_rate=1e-3, num_epochs=4, seed=0, use_labels=True,
              save_dir=folder, **arguments)

    def loss_of(x0, noise, t, label):
        return (model(x0 + noise, t, label) - noise).square().mean()
    for x0, label in run.batches():
        noise = torch.randn(x0.shape, generator=run.rng, device="cuda")
        if run.steps + 1 == until:
            run._meet_at = 0  # look at once
            signal.raise_signal(signal.SIGINT)
        run.step(loss_of, x0, noise, torch.full((8,), 50, device="cuda"), label)
    run.folder.lock.release()
    return run.losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_step_is_the_plain_one(cuda, tmp_path, monkeypatch, precision):
    recorded = losses_on_gpu(tmp_path / "recorded", precision=precision)
    monkeypatch.setattr(training_step, "recorded", lambda step: step)
    assert losses_on_gpu(tmp_path / "plain", precision=precision) == recorded and len(recorded) == 20


def test_on_a_gpu_a_resumed_run_is_the_one_that_never_stopped(cuda, tmp_path):
    whole = losses_on_gpu(tmp_path / "whole")
    first = losses_on_gpu(tmp_path / "stopped", until=11)
    assert len(first) == 11 and losses_on_gpu(tmp_path / "stopped", resume=True) == whole


def test_each_loop_makes_its_step_anew(tmp_path, monkeypatch):
    made = []

    def fastest(self, loss_of, *batch):
        made.append(loss_of)
        self._over_processes = None
        return partial(self._plain_step, loss_of)
    monkeypatch.setattr(training_step.TrainingStep, "_fastest_step", fastest)
    run = run_in(tmp_path)
    loss = loss_by(run)
    for end in (4, 10):
        for x0, label in run.batches():
            run.step(loss, x0, torch.zeros_like(x0), label)
            if run.steps == end:
                break
    assert made == [loss, loss]


def test_on_a_gpu_another_loop_reads_what_the_loss_uses_now(cuda, tmp_path):
    """As where the cell of the noise schedule was run again: a recorded step has the addresses of its tensors."""
    model = U_net("cuda", t_dim=8, widths=(8,))
    run = Run(model, Data(), batch_size=8, learning_rate=1e-6, num_epochs=4, seed=0, save_dir=tmp_path)

    def loss_of(x0, t):
        return scale * model(x0, t).square().mean()
    for value in (1.0, 100.0):
        scale = torch.full((), value, device="cuda")
        for x0, _ in run.batches():
            run.step(loss_of, x0, torch.full((8,), 50, device="cuda"))
            if value == 1 and run.steps == 10:
                break
    run.folder.lock.release()
    assert 50 < run.losses[-1] / run.losses[0] < 200


def compile_with(monkeypatch, forwards=None, backwards=None):
    """Has torch.compile raise these errors while it compiles."""
    def compiler(error):
        def compile_graph(graph, inputs):
            if error:
                raise error
            return make_boxed_func(graph.forward)
        return compile_graph
    backend = aot_autograd(fw_compiler=compiler(forwards), bw_compiler=compiler(backwards))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


@pytest.mark.parametrize("fails", ["forwards", "backwards", None])
def test_what_cannot_be_compiled_stays_plain(monkeypatch, capsys, fails):
    compile_with(monkeypatch, **{fails: OSError("no compiler here")} if fails else {})
    weight, before = torch.randn(3, requires_grad=True), torch.get_rng_state()

    def loss_of(x):
        return (weight * x + 0 * torch.rand(3)).sum()
    loss = compiled(loss_of, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), before) and (loss is loss_of) == bool(fails)
    x = torch.arange(3.0)
    assert torch.autograd.grad(loss(x), weight)[0].tolist() == [0, 1, 2]
    assert ("not compiled, which is slower: " in (said := capsys.readouterr().out)) == bool(fails)
    assert ("no compiler here" in said) == bool(fails)


def test_a_full_memory_is_no_reason_to_go_on_uncompiled(monkeypatch):
    compile_with(monkeypatch, backwards=torch.OutOfMemoryError("CUDA out of memory"))
    weight = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        compiled(lambda x: (weight * x).sum(), torch.ones(3))


def test_on_a_gpu_what_cannot_be_compiled_changes_nothing(cuda, tmp_path, monkeypatch):
    plain = losses_on_gpu(tmp_path / "plain")
    monkeypatch.setattr(training_step, "COMPILE_SECONDS", 0)
    compile_with(monkeypatch, backwards=OSError("no compiler here"))
    assert losses_on_gpu(tmp_path / "broken") == plain


@pytest.mark.parametrize("possible", [True, False])
def test_a_function_is_plain_at_first_then_recorded_where_possible(monkeypatch, capsys, possible):
    """The streams and the graph of a GPU are stood in for."""
    class Stream:
        def wait_stream(self, other):
            pass

    def record(function, *given):
        if not possible:
            raise RuntimeError("cannot be captured\nmore")
        return lambda x: -function(x)  # another than the plain one
    for name, value in (("Stream", Stream), ("current_stream", Stream), ("stream", lambda it: nullcontext())):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(recorded_module, "record", record)
    square = recorded(lambda x: x * x, plain_calls=2)
    assert [square(x) for x in (1, 2, 3, 4)] == ([1, 4, -9, -16] if possible else [1, 4, 9, 16])
    said = capsys.readouterr().out
    assert said.count("not recorded as a CUDA graph, which is slower: cannot be captured\n") == (not possible)


def test_a_step_that_cannot_be_recorded_stays_plain(cuda, capsys):
    def looks_at_a_number(x):
        return x * x.sum().item()
    twice = recorded(looks_at_a_number, plain_calls=1)
    stream = torch.cuda.current_stream()
    assert [twice(torch.full((2,), value, device=cuda)).tolist() for value in (1.0, 2.0, 3.0)] == [
        [2.0, 2.0], [8.0, 8.0], [18.0, 18.0]]
    assert torch.cuda.current_stream() == stream
    assert "not recorded as a CUDA graph" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="reads the environment of torchrun")
def test_one_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert machine.choose_device() == "cpu" and not torch.distributed.is_initialized()


def test_a_mac_trains_on_its_gpu_alone_and_on_its_processor_under_torchrun(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator",
                        lambda check_available=False: torch.device("mps"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert machine.choose_device() == "mps"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert machine.choose_device() == "cpu"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator",
                        lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 3 on this machine has no GPU; set --nproc-per-node 2"):
        machine.choose_device()
