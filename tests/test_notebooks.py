"""Both notebooks, run as a user runs them, and the form in which they are committed."""

import json
import os
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from PIL import Image

from checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
MNIST = str(ROOT / "Assets" / "MNIST" / "train-images-idx3-ubyte.gz")
PARAMETERS = {
    "train.ipynb": "data_path image_size in_channels num_timesteps t_dim network batch_size learning_rate num_epochs "
                   "max_images seed save_dir resume",
    "generate_image.ipynb": "model_path num_images sampler num_steps seed output_dir"}


def run(name, folder, parameters, before_the_loop=""):
    """Runs a notebook on `parameters`, with a cell of code put in before its loop; returns what its cells printed."""
    notebook = nbformat.read(ROOT / name, 4)
    loop = next(i for i, cell in enumerate(notebook.cells) if "tqdm(" in cell.source and cell.cell_type == "code")
    notebook.cells.insert(loop, nbformat.v4.new_code_cell(before_the_loop))
    nbformat.write(notebook, folder / name)
    notebook = papermill.execute_notebook(folder / name, folder / name, parameters, cwd=ROOT, progress_bar=False)
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def train(folder, before_the_loop="", **parameters):
    small = {"network": {"widths": [16, 32]}, "t_dim": 32, "max_images": 256, "num_epochs": 1, "num_timesteps": 100}
    parameters = {"data_path": MNIST, "save_dir": str(folder / "run")} | small | parameters
    return run("train.ipynb", folder, parameters, before_the_loop)


def generate(folder, **parameters):
    out = folder / "images"
    parameters = {"model_path": str(folder / "run" / "model.pth"), "output_dir": str(out)} | parameters
    return out, run("generate_image.ipynb", folder, parameters)


def test_train_on_mnist_then_generate(tmp_path):
    shipped = ROOT / "Save_model" / "model_DDPM.pth"
    before = shipped.stat().st_mtime_ns
    train(tmp_path, network={}, num_timesteps=1000, t_dim=256)
    out, _ = generate(tmp_path, num_images=4, num_steps=5)
    assert sorted(os.listdir(out)) == ["denoising.gif", "denoising_strip.png", "grid.png", *(f"x_{i}.png" for i in range(4))]
    assert all(Image.open(out / f"x_{i}.png").size == (28, 28) for i in range(4))
    assert Image.open(out / "denoising.gif").n_frames == 6
    assert shipped.stat().st_mtime_ns == before


def test_train_on_a_folder_of_colour_images_then_generate(tmp_path):
    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 100, 200)).save(tmp_path / f"{i}.png")
    train(tmp_path, data_path=str(tmp_path), image_size=20, in_channels=3)
    out, printed = generate(tmp_path, num_images=2, num_steps=10, sampler="ddim")
    assert Image.open(out / "x_1.png").size == (20, 20) and Image.open(out / "x_1.png").mode == "RGB"
    assert "20 x 20 pixels, 3 channel(s)" in printed


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Interrupted when the first of two epochs is saved, then resumed: not one bit differs."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train(whole, num_epochs=2)
    with pytest.raises(papermill.PapermillExecutionError, match="KeyboardInterrupt"):
        train(parts, "save_epoch = save\ndef save(epoch):\n    save_epoch(epoch)\n    raise KeyboardInterrupt", num_epochs=2)
    assert load_checkpoint(parts / "run" / "state.pth")["epoch"] == 1
    with pytest.raises(papermill.PapermillExecutionError, match="learning_rate: the run in .* has 0.001, .* has 0.5"):
        train(parts, num_epochs=2, resume=True, learning_rate=0.5)
    train(parts, num_epochs=2, resume=True)
    one, other = (load_checkpoint(folder / "run" / "state.pth") for folder in (whole, parts))
    assert one["losses"] == other["losses"] and len(one["losses"]) == 8
    assert torch.equal(one["rng"], other["rng"])
    for part in ("model", "ema", "optimizer", "lr_schedule"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_before_a_weight_changes(tmp_path):
    train(tmp_path)
    before = (tmp_path / "run" / "model.pth").read_bytes()
    with pytest.raises(papermill.PapermillExecutionError, match="step 1: the gradient is not finite at learning rate 9.*e.29"):
        train(tmp_path, learning_rate=1e30)
    (kept,) = (tmp_path / "run").glob("model-*.pth")  # a new run sets the old one's files aside
    assert kept.read_bytes() == before


@pytest.mark.parametrize("name", PARAMETERS)
def test_committed_notebooks_are_clean(name):
    notebook = nbformat.read(ROOT / name, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None for cell in code)
    assert not any(output.output_type == "error" or output.get("execution_count") for cell in code for output in cell.outputs)
    assert not re.search(r"/(home|root|Users|tmp|work|mnt)/|[A-Z]:\\\\", json.dumps(notebook))
    (parameters,) = (cell for cell in code if "parameters" in cell.metadata.get("tags", []))
    assert re.findall(r"^(\w+) = ", parameters.source, re.M) == PARAMETERS[name].split()
