"""Both notebooks, run as a user runs them, and the form in which they are committed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import nbconvert
import nbformat
import numpy as np
import papermill
import pytest
import torch
from PIL import Image

from checkpoint import load_checkpoint, save_checkpoint
from model import U_net

ROOT = Path(__file__).parents[1]
MNIST = str(ROOT / "Assets" / "MNIST" / "train-images-idx3-ubyte.gz")
PARAMETERS = {
    "train.ipynb": "data_path image_size in_channels num_timesteps t_dim network initial_weights batch_size micro_batch_size "
                   "learning_rate num_epochs max_images seed save_dir resume",
    "generate_image.ipynb": "model_path num_images sampler num_steps guidance seed output_dir"}


SMALL = {"data_path": MNIST, "network": {"widths": [16, 32]}, "t_dim": 32, "max_images": 256, "num_epochs": 2,
         "num_timesteps": 100, "batch_size": 64}


def prepare(name, folder, parameters, before_the_loop=""):
    """Writes a copy of a notebook with `parameters`, and with a cell of code before its loop; returns its path."""
    notebook = nbformat.read(ROOT / name, 4)
    loop = next(i for i, cell in enumerate(notebook.cells) if "tqdm(" in cell.source and cell.cell_type == "code")
    notebook.cells.insert(loop, nbformat.v4.new_code_cell(before_the_loop))
    nbformat.write(notebook, folder / name)
    papermill.execute_notebook(folder / name, folder / name, parameters, progress_bar=False, prepare_only=True)
    return folder / name


def in_a_kernel(path):
    """Runs a notebook in a process of its own, as Jupyter does."""
    papermill.execute_notebook(path, path, cwd=ROOT, progress_bar=False)


def here(path):
    """Runs the code of a notebook in this process, which is quicker, on the CPU; returns the names that it defines."""
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.pyplot.show", lambda: None)
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr("model.bf16_is_faster", lambda *_: False)  # a measurement, which may differ from run to run
        names = {}
        exec(compile(code, f"<{path.name}>", "exec"), names)
    plt.close("all")
    return names


def train(folder, before_the_loop="", run=here, **parameters):
    return run(prepare("train.ipynb", folder, SMALL | {"save_dir": str(folder / "run")} | parameters, before_the_loop))


def generate(folder, run=here, **parameters):
    out = folder / "images"
    parameters = {"model_path": str(folder / "run" / "model.pth"), "output_dir": str(out)} | parameters
    run(prepare("generate_image.ipynb", folder, parameters))
    return out


def same(one, other):
    """Whether two trees of dictionaries, lists, tensors and plain values are equal in every bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_train_on_mnist_then_generate(tmp_path):
    train(tmp_path, run=in_a_kernel, network={}, num_timesteps=1000, t_dim=256, num_epochs=1)
    out = generate(tmp_path, run=in_a_kernel, num_images=4, num_steps=5)
    assert sorted(os.listdir(out)) == ["denoising.gif", "denoising_strip.png", "grid.png", *(f"x_{i}.png" for i in range(4))]
    assert all(Image.open(out / f"x_{i}.png").size == (28, 28) for i in range(4))
    assert Image.open(out / "denoising.gif").n_frames == 6


def test_train_on_a_folder_of_colour_images_then_generate(tmp_path, capsys):
    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 100, 200)).save(tmp_path / f"{i}.png")
    train(tmp_path, data_path=str(tmp_path), image_size=[20, 24], in_channels=3, num_epochs=1)
    out = generate(tmp_path, num_images=2, num_steps=10, sampler="ddim")
    assert Image.open(out / "x_1.png").size == (24, 20) and Image.open(out / "x_1.png").mode == "RGB"
    assert "20 x 24 pixels, 3 channel(s)" in capsys.readouterr().out


def test_no_image_is_too_few(finished_run):
    with pytest.raises(ValueError, match="num_images 0: must be at least 1"):
        generate(finished_run, num_images=0)


def test_the_gradient_is_that_of_the_papers_loss_and_the_average_is_of_a_thousand_steps(tmp_path):
    names = train(tmp_path, max_images=256, num_epochs=4)
    assert fmean(names["losses"][-4:]) < names["losses"][0] / 2  # which guesses nothing yet

    model, x0, t = names["model"], names["data"][:5], torch.tensor([0, 10, 30, 60, 99])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    alpha_bar = (1 - torch.linspace(0.001, 0.2, 100)).cumprod(0)[t].view(5, 1, 1, 1)
    error = (noise - model(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, t))**2  # Eq. 14
    snr = alpha_bar / (1 - alpha_bar)
    loss = (torch.minimum(snr, torch.tensor(5.0)) / snr * error).mean()  # Hang et al. 2023
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(names["compute_gradients"](x0, noise, t), loss.detach())
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)

    for steps, share in ((0, 0.9), (90, 0.09), (8990, 0.001), (10**6, 0.001)):  # of the new weights in the average
        average = torch.zeros(3)
        names["ema_update"]([average], [torch.ones(3)], torch.tensor(steps))
        torch.testing.assert_close(average, torch.full((3,), share))


def test_a_gradient_is_shortened_to_norm_1_where_it_is_longer(tmp_path):
    steep = ("weight *= 1000\nnorms = []\ndef keep(*_):\n"
             "    norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())\n"
             "optimizer.register_step_pre_hook(keep)")
    names = train(tmp_path, steep, num_epochs=1)
    assert names["norms"] == pytest.approx([1.0] * 4, rel=1e-3)
    parameters = list(names["model"].parameters())
    count = sum(p.numel() for p in parameters)
    for norm, clipped in ((40.0, 1.0), (0.5, 0.5)):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, norm / count**0.5)
        names["clip_gradient"](step=1)
        for parameter in parameters:
            torch.testing.assert_close(parameter.grad, torch.full_like(parameter, clipped / count**0.5), rtol=1e-4, atol=0)


def test_a_checkpoint_that_does_not_say_how_to_draw_from_it_is_refused(tmp_path):
    save_checkpoint(U_net(t_dim=8, widths=(8,)).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="model.pth: does not say its image_size and noise_schedule"):
        generate(tmp_path, model_path=str(tmp_path / "model.pth"))


def test_the_average_after_a_sixteenth_of_a_run_guides_its_end(tmp_path, capsys):
    keep = "seen = []\ndef keep(*_): seen.append([p.detach().clone() for p in model.parameters()])\n"
    names = train(tmp_path, keep + "optimizer.register_step_post_hook(keep)", batch_size=16)  # two epochs of 16 steps
    guide = U_net.from_checkpoint(tmp_path / "run" / "model_guide.pth")
    assert guide.metadata["training"]["steps"] == 2
    for average, first, second in zip(guide.parameters(), *names["seen"][:2]):
        torch.testing.assert_close(average, 2 / 11 * first + 9 / 11 * second)

    def pixels(guidance):
        return np.asarray(Image.open(generate(tmp_path, num_images=4, num_steps=5, guidance=guidance) / "grid.png")).astype(int)
    alone = pixels(1)
    assert "without a guide" in capsys.readouterr().out
    once, twice = (abs(pixels(guidance) - alone).mean() for guidance in (1.1, 1.2))
    assert "model_guide.pth" in capsys.readouterr().out and 0 < once < twice

    (tmp_path / "run" / "model_guide.pth").unlink()
    assert (pixels(2) == alone).all()
    assert re.search("guidance 2 has no effect: there is no .*model_guide.pth", capsys.readouterr().out)

    guide.metadata["image_size"] = 32
    save_checkpoint(guide.state_dict(), tmp_path / "run" / "model_guide.pth")
    with pytest.raises(ValueError, match="image_size: .*model_guide.pth has 32, .*model.pth has 28"):
        generate(tmp_path)


IN_FP32 = "use_bf16 = False"  # instead of what a measurement found, which may differ from run to run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder whose `run` is two epochs of four steps, on the CPU, where a run can be repeated to the bit."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        train(folder, IN_FP32, in_a_kernel)
    return folder


@pytest.fixture
def finished_run(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shutil.copytree(uninterrupted / "run", tmp_path / "run")
    return tmp_path


def train_until(folder, step, begins_at, **parameters):
    """Trains until the signal of Jupyter's Stop button comes in the middle of a step."""
    stop = (f"{IN_FP32}\nassert len(losses) == {begins_at}\nimport signal\ndef after_the_optimizer(*_):\n"
            f"    if len(losses) + 1 == {step}: os.kill(os.getpid(), signal.SIGINT)\n"
            "optimizer.register_step_post_hook(after_the_optimizer)")
    message = f"stopped after step {step}; resume=True goes on from .*state.pth"
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        train(folder, stop, in_a_kernel, **parameters)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train_until(tmp_path, step=4, begins_at=0)  # the end of an epoch
    train_until(tmp_path, step=6, begins_at=4, resume=True)  # the middle of one
    train(tmp_path, "assert len(losses) == 6", in_a_kernel, resume=True)
    resumed, whole = (load_checkpoint(folder / "run" / "state.pth") for folder in (tmp_path, uninterrupted))
    assert len(resumed["losses"]) == 8 and resumed["losses"] == whole["losses"]
    for part in ("model", "ema", "optimizer", "lr_schedule"):
        one, other = ({name: value for name, value in state[part].items() if not name.endswith("_extra_state")}
                      for state in (resumed, whole))  # which says how many seconds the run took
        assert same(one, other)


def test_a_run_that_was_shortened_past_its_sixteenth_still_gets_a_guide(finished_run):
    guide = finished_run / "run" / "model_guide.pth"
    guide.unlink()
    train(finished_run, resume=True, num_epochs=3)  # of four steps each; eight are done
    assert U_net.from_checkpoint(guide).metadata["training"]["steps"] == 9


def test_a_finished_run_may_train_on(finished_run):
    train(finished_run, "assert len(losses) == 8", resume=True, num_epochs=3)
    assert len(load_checkpoint(finished_run / "run" / "state.pth")["losses"]) == 12
    training = U_net.from_checkpoint(finished_run / "run" / "model.pth").metadata["training"]
    assert (training["parameters"]["num_epochs"], training["steps"], training["images_seen"]) == (3, 12, 768)


def test_a_run_starts_from_initial_weights(finished_run, uninterrupted):
    start = finished_run / "model.pth"
    shutil.copy(uninterrupted / "run" / "model.pth", start)
    train(finished_run, f"assert all(torch.equal(p, q) for p, q in zip(model.parameters(), U_net.from_checkpoint({str(start)!r}, "
          "device).parameters()))", initial_weights=str(start), num_epochs=1, max_images=64)
    training = U_net.from_checkpoint(finished_run / "run" / "model.pth").metadata["training"]
    assert training["earlier"] == U_net.from_checkpoint(start).metadata["training"]
    assert training["parameters"]["initial_weights"] == str(start) and training["steps"] == 1


@pytest.mark.parametrize("parameters, message", [
    ({"network": {"widths": [16, 16]}}, r"widths: the checkpoint has \(16, 32\), this network has \(16, 16\)"),
    ({"num_timesteps": 200}, "noise_schedule: .*'num_timesteps': 100.* this notebook has .*'num_timesteps': 200")])
def test_initial_weights_of_something_else_are_refused(finished_run, parameters, message):
    with pytest.raises(ValueError, match=message):
        train(finished_run, initial_weights=str(finished_run / "run" / "model.pth"), save_dir=str(finished_run), **parameters)


def test_a_run_that_would_write_over_its_initial_weights_is_refused(finished_run):
    with pytest.raises(ValueError, match="initial_weights .*model.pth: this run would write over it"):
        train(finished_run, initial_weights=str(finished_run / "run" / "model.pth"))


def test_a_resume_with_another_learning_rate_is_refused(finished_run):
    with pytest.raises(ValueError, match="learning_rate: the run in .* has 0.001, .* has 0.5"):
        train(finished_run, resume=True, learning_rate=0.5)


def test_a_gradient_that_is_not_finite_stops_before_a_weight_changes(finished_run):
    before = (finished_run / "run" / "model.pth").read_bytes()
    guard = ("def before_a_step(*_):\n    assert all(p.grad.isfinite().all() for p in model.parameters())\n"
             "optimizer.register_step_pre_hook(before_a_step)")
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite at learning rate 9.62e.29"):
        train(finished_run, guard, learning_rate=1e30)
    (kept,) = (finished_run / "run").glob("*/model.pth")  # a new run sets the old one's files aside
    assert kept.read_bytes() == before and sorted(os.listdir(kept.parent)) == ["model.pth", "model_guide.pth", "state.pth"]
    train(finished_run, "assert len(losses) == 8", save_dir=str(kept.parent), resume=True)


def train_as_script(folder, before_the_loop, launcher=(), **parameters):
    """The notebook as README runs it on many devices: parameters put in, converted to a script, started by torchrun."""
    folder.mkdir()
    notebook = prepare("train.ipynb", folder, SMALL | {"save_dir": str(folder / "run")} | parameters, before_the_loop)
    script, _ = nbconvert.PythonExporter().from_filename(notebook)
    (folder / "train.py").write_text(script)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    finished = subprocess.run([sys.executable, *launcher, folder / "train.py"], cwd=ROOT, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")


SGD = f"{IN_FP32}\noptimizer = torch.optim.SGD(model.parameters(), 0.1)"

LEAVE_WEIGHTS = """
import atexit  # every rank leaves its weights behind, and only the first may save checkpoints
atexit.register(lambda: torch.save(dict(model.named_parameters()), f"{save_dir}-rank-{rank}.pth"))
_save_checkpoint = save_checkpoint
def save_checkpoint(state, path):
    assert rank == 0
    _save_checkpoint(state, path)
"""


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # of the one whose optimizer SGD replaced
def test_two_processes_and_parts_of_batches_train_like_one_process_on_whole_batches(tmp_path):
    steps = {"max_images": 210, "batch_size": 11, "num_epochs": 1}  # twenty steps, the last of a single image
    one, parts = (dict(train(tmp_path, SGD, **parts, **steps)["model"].named_parameters())
                  for parts in ({}, {"micro_batch_size": 3}))
    train_as_script(tmp_path / "two", SGD + LEAVE_WEIGHTS, TWO_PROCESSES, **steps)
    two, other_rank = (torch.load(tmp_path / "two" / f"run-rank-{rank}.pth") for rank in (0, 1))
    assert same(two, other_rank) and two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(parts[name], one[name], rtol=0, atol=1e-6)


def test_a_job_whose_worker_is_killed_starts_again_and_resumes(tmp_path, uninterrupted):
    kill = IN_FP32 + """
assert len(losses) == (4 if restarted else 0)
def after_the_optimizer(*_):
    if rank == 1 and not restarted and len(losses) == 5: os.kill(os.getpid(), 9)
optimizer.register_step_post_hook(after_the_optimizer)
"""
    printed = train_as_script(tmp_path / "killed", kill, TWO_PROCESSES)
    assert "exitcode: -9" in printed
    killed, whole = (load_checkpoint(folder / "run" / "state.pth")["losses"] for folder in (tmp_path / "killed", uninterrupted))
    assert killed == pytest.approx(whole, rel=1e-4) and len(whole) == 8


def test_a_restarted_job_leaves_the_run_of_another_alone(finished_run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for job, begins_at in (("one", 0), ("one", 8), ("two", 0)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        train(finished_run, f"assert len(losses) == {begins_at}")


@pytest.mark.parametrize("name", PARAMETERS)
def test_committed_notebooks_are_clean(name):
    committed = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=True).stdout
    notebook = nbformat.reads(committed.decode(), 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None for cell in code)
    assert not any(output.output_type == "error" or output.get("execution_count") for cell in code for output in cell.outputs)
    assert not re.search(r"/(home|root|Users|tmp|work|mnt)/|[A-Z]:\\\\", json.dumps(notebook))
    (parameters,) = (cell for cell in code if "parameters" in cell.metadata.get("tags", []))
    assert re.findall(r"^(\w+) = ", parameters.source, re.M) == PARAMETERS[name].split()


def test_a_run_writes_beside_the_shipped_checkpoint_where_git_ignores_it():
    (save_dir,) = re.findall(r'^save_dir = "(.*)"$', nbformat.read(ROOT / "train.ipynb", 4).cells[3].source, re.M)
    assert subprocess.run(["git", "check-ignore", "-q", f"{save_dir}/model.pth"], cwd=ROOT).returncode == 0
