"""All notebooks, run as a user runs them, and the form in which they are committed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import run_notebook
from checkpoint import load_checkpoint, save_checkpoint
from dataset_loader import image_grid, read_idx
from model import U_net
from training import Run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from keep_outputs import code_digest  # noqa: E402

MNIST = str(ROOT / "Assets" / "MNIST" / "train-images-idx3-ubyte.gz")
PARAMETERS = {
    "train.ipynb": "data_path image_size in_channels labels num_epochs batch_size save_dir resume "
                   "max_images learning_rate seed num_timesteps t_dim network initial_weights "
                   "micro_batch_size precision",
    "generate_image.ipynb": "model_path num_images first_image label seed output_dir sampler "
                            "num_steps guidance precision",
    "edit_image.ipynb": "model_path image_path label seed output_dir num_images num_steps"}
SMALL = {"data_path": MNIST, "network": {"widths": [16, 32]}, "t_dim": 32, "max_images": 256,
         "num_epochs": 2, "num_timesteps": 100, "batch_size": 64, "precision": "fp32"}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plt, "show", plt.show)  # run_notebook replaces it
    monkeypatch.setattr("dataset_loader.show_table", lambda *_: None)  # slow; in Jupyter, below, it runs
    yield
    plt.close("all")


def train(folder, shown=lambda *_: None, **parameters):
    return run_notebook.run_notebook("train.ipynb", SMALL | {"save_dir": str(folder / "run")} | parameters,
                                     shown)


def generate(folder, **parameters):
    """Draws in few steps; returns the folder of the images and the names that the notebook defines."""
    out = folder / "images"
    parameters = {"model_path": str(folder / "run" / "model.pth"), "output_dir": str(out),
                  "num_images": 4, "num_steps": 5, "precision": "fp32"} | parameters
    return out, run_notebook.run_notebook("generate_image.ipynb", parameters)


def edit(folder, **parameters):
    """Edits in few steps; returns the names that the notebook defines."""
    parameters = {"model_path": str(folder / "run" / "model.pth"), "num_images": 6,
                  "output_dir": str(folder / "edited"), "num_steps": 5} | parameters
    return run_notebook.run_notebook("edit_image.ipynb", parameters)


def pixels(folder):
    return np.stack([np.asarray(Image.open(folder / f"x_{i}.png")) for i in range(4)]).astype(int)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder whose `run` is one of eight steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(plt, "show", plt.show)
        train(folder)
    return folder


def test_the_readmes_first_command_runs_all_notebooks_in_jupyter(tmp_path):
    """In copies, since the notebooks write beside themselves."""
    (tmp_path / "Assets").symlink_to(ROOT / "Assets")
    for name in PARAMETERS:
        notebook = nbformat.read(name, 4)
        cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        few = SMALL | {"save_dir": str(tmp_path / "run")} if name == "train.ipynb" else {
            "model_path": str(tmp_path / "run" / "model.pth"), "num_images": 2, "num_steps": 3,
            "output_dir": str(tmp_path / name.removesuffix("_image.ipynb"))}
        cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in few.items())
        nbformat.write(notebook, tmp_path / name)
        finished = subprocess.run(
            [sys.executable, "-m", "jupyter", "execute", "--output=ran", str(tmp_path / name)], text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=600, cwd=ROOT)
        assert finished.returncode == 0, finished.stderr
    assert {"x_0.png", "x_1.png"} == set(os.listdir(tmp_path / "generate"))
    assert {"grid.png", "classes.png"} == set(os.listdir(tmp_path / "generate_figures"))
    assert {"filled.png", "redrawn.png", "between.png", "bound.png"} <= set(
        os.listdir(tmp_path / "edit"))


def test_the_last_prediction_of_a_guided_image_is_the_networks_own(trained):
    names = generate(trained)[1]
    guided, alone = names["guided"](3), names["model"]
    for num_steps in (1, 2):
        ours, theirs = (names["draw"](predict, *names["start"](range(2)), num_steps=num_steps)
                        for predict in (guided, alone))
        assert torch.equal(ours, theirs) == (num_steps == 1)


def test_a_folder_of_colour_images_with_classes_is_learnt_and_drawn_by_name(tmp_path, capsys):
    for name, colour in (("warm", (220, 60, 20)), ("cold", (20, 60, 220))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (40, 30), colour).save(tmp_path / "data" / name / f"{i}.png")
    train(tmp_path, data_path=str(tmp_path / "data"), image_size=[20, 24], in_channels=3, num_epochs=60,
          batch_size=16, learning_rate=3e-3)
    assert "{'cold': 16, 'warm': 16}" in capsys.readouterr().out
    for name, first, second in (("warm", 0, 2), ("cold", 2, 0)):
        out, _ = generate(tmp_path, label=name, num_steps=20)
        assert Image.open(out / "x_0.png").size == (24, 20)
        drawn = pixels(out).mean(axis=(1, 2))  # (image, channel): the label steers
        more = drawn[:, first] - drawn[:, second]
        assert (more > 0).all() and more.mean() > 40
    with pytest.raises(ValueError, match="label 'hot': choose from cold, warm"):
        generate(tmp_path, label="hot")


def test_what_was_learnt_by_heart_is_seen_beside_a_test_set(tmp_path):
    """Eight images of noise can be learnt by heart only. Others of the same kind are then as hard as ever."""
    rng, folder, legends = np.random.default_rng(0), tmp_path / "images" / "train", []
    for name, count in (("train", 8), ("test", 40)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            picture = np.uint8(255 * rng.integers(2, size=(8, 8)))
            Image.fromarray(picture).save(tmp_path / "images" / name / f"{i}.png")

    def shown(names, number, picture):
        if number == 27:
            (axis,) = plt.gcf().axes
            legends.append({line.get_label(): len(line.get_xdata()) for line in axis.lines})
    train(tmp_path, shown, data_path=str(folder), image_size=8, num_epochs=600, batch_size=8,
          learning_rate=3e-3, max_images=None)
    (by_heart, eight), (never_seen, forty) = legends[0].items()
    assert (eight, forty) == (8, 40)
    assert by_heart.startswith("training images: ") and never_seen.startswith("test images: ")
    assert float(never_seen.split()[-1]) > 1.5 * float(by_heart.split()[-1])
    train(tmp_path, shown, data_path=str(folder.parent / "test"), image_size=8, num_epochs=1)
    assert list(legends[1].values()) == [40]  # no other set: this one alone


def test_the_loss_is_the_papers_weighted_by_the_signal_to_noise_ratio(trained):
    names = train(trained, resume=True)
    model, x0, t = names["model"], names["data"][:5], torch.tensor([0, 10, 30, 60, 99])
    label = torch.tensor([0, 1, 2, 9, 10])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    alpha_bar = (1 - torch.linspace(0.001, 0.2, 100)).cumprod(0)[t].view(5, 1, 1, 1)
    xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    error = (noise - model(xt, t, label))**2  # Eq. 14
    snr = alpha_bar / (1 - alpha_bar)
    expected = (torch.minimum(snr, torch.tensor(5.0)) / snr * error).mean()  # Hang et al. 2023
    torch.testing.assert_close(names["loss_of"](x0, noise, t, label), expected, rtol=1e-4, atol=1e-6)


def test_about_15_percent_of_the_labels_are_left_out_as_seed_and_step_say(tmp_path, monkeypatch):
    seen = []

    def step(run, loss_of, x0, noise, t, label):  # one that only looks
        seen.append(label)
        run.training_step.steps += 1
        run._pending.append(torch.ones(2))
    monkeypatch.setattr(Run, "step", step)
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        train(tmp_path / name, num_epochs=20, seed=seed)
    first, again, other = torch.cat(seen).view(3, 20, 256)
    assert torch.equal(first, again) and not torch.equal(first == 10, other == 10)
    share = (first == 10).float().mean(dim=1)
    assert 0.13 < share.mean() < 0.17 and share.std() > 0  # 0.005 is chance
    told = torch.bincount(first[first < 10], minlength=10) / (0.85 * 20)
    there = torch.bincount(read_idx(MNIST.replace("images-idx3", "labels-idx1"))[:256].long(), minlength=10)
    assert (told - there).abs().max() < 4


def test_training_with_labels_that_was_stopped_goes_on_as_if_it_never_stopped(trained, tmp_path, monkeypatch):
    take_step = Run.step

    def step_and_stop(run, *batch):
        take_step(run, *batch)
        if run.steps == 3:
            run._meet_at = 0  # look at once
            signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", step_and_stop)
        assert train(tmp_path)["run"].steps == 3
    train(tmp_path, resume=True)
    whole, parts = (load_checkpoint(folder / "run" / "model.pth") for folder in (trained, tmp_path))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items() if name != "_extra_state")


def test_a_run_without_labels_knows_no_label(tmp_path):
    train(tmp_path, labels=False)
    model = U_net.from_checkpoint(tmp_path / "run" / "model.pth")
    assert model.network["num_classes"] == 0 and "label_embedding.weight" not in model.state_dict()
    generate(tmp_path)
    with pytest.raises(ValueError, match="label 7: this network was trained without labels"):
        generate(tmp_path, label=7)


def test_a_seed_draws_an_image_again_alone_or_with_others(trained):
    out, _ = generate(trained)
    four = pixels(out)
    generate(trained, num_images=1)
    alone = np.asarray(Image.open(out / "x_0.png")).astype(int)
    assert abs(alone - four[0]).max() <= 1  # one grey level, of rounding
    generate(trained, first_image=2, num_images=2)  # writes over two of them
    assert abs(pixels(out) - four).max() <= 1
    generate(trained, seed=1)
    assert (pixels(out) != four).any()


def test_guidance_is_what_the_checkpoint_proposes_and_grows(trained, tmp_path, capsys):
    state = load_checkpoint(trained / "run" / "model.pth")
    torch.nn.init.normal_(state["label_embedding.weight"], std=3.0)  # as if it knew the labels well
    (tmp_path / "run").mkdir()
    save_checkpoint(state, tmp_path / "run" / "model.pth")
    out, names = generate(tmp_path)
    assert names["guidance"] == 1  # so short a run has no guide
    alone = pixels(out)
    moved = [abs(pixels(generate(tmp_path, guidance=w)[0]) - alone).mean() for w in (1.1, 1.3)]
    assert 0 < moved[0] < moved[1]
    assert "guidance 1.3, guide: without label" in capsys.readouterr().out
    state["_extra_state"]["guidance"] = 1.4
    for name in ("model", "model_guide"):
        save_checkpoint(state, tmp_path / "run" / f"{name}.pth")
    assert generate(tmp_path)[1]["guidance"] == 1.4
    assert "guidance 1.4, guide: early network" in capsys.readouterr().out


def test_the_sliders_begin_at_the_parameters_and_draw_what_they_say(trained, monkeypatch, capsys):
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook in a browser")
    made, make = [], ipywidgets.interactive.__init__

    def keep(self, *given, **named):
        make(self, *given, **named)
        made.append(self)
    monkeypatch.setattr(ipywidgets.interactive, "__init__", keep)
    generate(trained)
    assert made.pop().children[0].value is None
    names = generate(trained, seed=3, label=[2, 1])[1]
    label, seed, steps, guidance = made[0].children[:4]
    assert (label.value, seed.value, steps.value, guidance.value) == ("2", 3, 5, 1.0)
    label.value, seed.value = "7", 4
    drawn = names["draw"](names["guided"](1.0), *names["start"](range(1), "7", 4))
    assert np.array_equal(made[0].result, image_grid(drawn, columns=1, scale=6))


def test_guidance_without_a_guide_is_refused(tmp_path):
    train(tmp_path, labels=False, num_epochs=1)
    with pytest.raises(ValueError, match="guidance 1.5: no .*model_guide.pth; set guidance = 1"):
        generate(tmp_path, guidance=1.5)
    path = tmp_path / "run" / "model.pth"
    state = load_checkpoint(path)
    state["_extra_state"]["guidance"] = 1.5  # proposed for a guide that was not copied along
    save_checkpoint(state, path)
    assert generate(tmp_path)[1]["guidance"] == 1


def test_an_unlabelled_checkpoint_of_before_still_draws_the_same(tmp_path):
    """Without `classes` and `guidance` in its metadata, and with the arguments of the larger network."""
    torch.manual_seed(0)
    model = U_net(t_dim=8, widths=(8,))
    state = model.state_dict()
    old = {"network": {"in_channels": 1, "t_dim": 8, "widths": (8,), "blocks": 1, "bottleneck": None,
                       "attention": 0, "normalise": False, "patch": 1, "dropout": 0.0},
           "image_size": 28, "noise_schedule": {"num_timesteps": 50, "beta_start": 2e-3, "beta_end": 0.4}}
    (tmp_path / "run").mkdir()
    save_checkpoint(state | {"_extra_state": old}, tmp_path / "run" / "model.pth")
    out, names = generate(tmp_path)
    assert names["guidance"] == 1 and not names["classes"]
    x, t = torch.randn(1, 1, 28, 28), torch.tensor([3])
    assert torch.equal(names["model"](x, t), model(x, t))


# What else the network knows

def test_digits_are_edited_and_judged_with_their_labels(trained):
    names = edit(trained)
    x0, mask, (_, free, _, told) = names["x0"], names["mask"], names["completions"]
    labels = read_idx(ROOT / "Assets" / "MNIST" / "t10k-labels-idx1-ubyte.gz")
    labels = labels[:6].long()
    assert names["labels"].tolist() == labels.tolist()
    assert not torch.equal(free, told)
    for filled in (free, told):
        assert torch.equal(filled[..., mask], x0[:1].expand(8, 1, 28, 28)[..., mask])
        assert (filled[..., ~mask] != x0[:1][..., ~mask]).any()
    assert len(names["errors"]) == len(names["steps"]) == 4  # of 100 timesteps
    assert names["distance"].shape == (10, 6)  # classes, images
    assert names["wrong"] == [i for i in range(6) if names["found"][i] != labels[i]]
    terms, total = names["bounds"]["noise"]
    assert (total > names["bounds"]["as it is"][1]).all()
    model, scheduler = names["model"], names["scheduler"]
    expected, rng = scheduler.prior_term(x0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in range(100):  # of which the notebook draws one of each of 60 stretches
            t = torch.full((len(x0),), t)
            noise = torch.randn(x0.shape, generator=rng)
            noise_pred = model(scheduler.add_noise(x0, noise, t), t)
            expected = expected + scheduler.bound_terms(x0, noise, noise_pred, t)
    torch.testing.assert_close(names["bounds"]["as it is"][1], expected, rtol=0.03, atol=0)


def test_an_image_of_the_users_is_edited_by_an_unlabelled_network(tmp_path):
    train(tmp_path, labels=False, in_channels=3, image_size=[20, 24])
    Image.new("RGB", (300, 200), (220, 60, 20)).save(tmp_path / "mine.PNG")
    mine = str(tmp_path / "mine.PNG")
    names = edit(tmp_path, image_path=mine)
    colour = torch.tensor([220, 60, 20]).view(1, 3, 1, 1) / 127.5 - 1
    torch.testing.assert_close(names["x0"], colour.expand(2, 3, 20, 24))
    assert names["labels"] is None and "found" not in names
    assert {"filled.png", "between.png", "bound.png"} <= set(
        os.listdir(tmp_path / "edited"))
    with pytest.raises(ValueError, match="label 7: this network was trained without"):
        edit(tmp_path, image_path=mine, label=7)
    (tmp_path / "mine.PNG").write_bytes(b"no image")
    with pytest.raises(ValueError, match="mine.PNG: no image of a format that is read"):
        edit(tmp_path, image_path=mine)
    with pytest.raises(FileNotFoundError, match="none.png: no such folder or file"):
        edit(tmp_path, image_path=str(tmp_path / "none.png"))


def test_a_label_of_the_users_replaces_that_of_the_images(trained):
    own = edit(trained)
    taken_for = int(own["found"][own["wrong"][0]])
    names = edit(trained, label=taken_for)
    assert names["labels"].tolist() == [taken_for] * 6
    assert names["wrong"] == own["wrong"]  # by what the images show, not by what the network was told
    with pytest.raises(ValueError, match="label 'cat': choose from 0, 1"):
        edit(trained, label="cat")


def test_images_of_other_classes_than_the_networks_have_no_labels(trained, tmp_path):
    for name in "79":  # the first and the second class of the folder, but the eighth and the tenth of the network
        (tmp_path / name).mkdir()
        Image.new("L", (28, 28)).save(tmp_path / name / "1.png")
    assert edit(trained, image_path=str(tmp_path))["labels"] is None


# From the command line, and on many processes

def command_line(folder, *launcher, **parameters):
    words = [part for name, value in (SMALL | {"save_dir": str(folder / "run")} | parameters).items()
             for part in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *launcher, "run_notebook.py", "train.ipynb", *words], cwd=ROOT,
                          env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=600)


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def assert_same_run(folder, other, steps):
    """But for rounding, which moves a weight by less than 1e-6. Processes that do not add their gradients up would
    move some by 7e-3, while their mean loss would hardly tell."""
    one, two = (load_checkpoint(path / "run" / "state.pth") for path in (folder, other))
    assert len(one["losses"]) == len(two["losses"]) == steps
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-4, atol=0)
    del one["model"]["_extra_state"], two["model"]["_extra_state"]
    torch.testing.assert_close(two["model"], one["model"], rtol=0, atol=5e-4)


def test_two_processes_train_like_one(tmp_path, trained):
    finished = command_line(tmp_path, *TWO_PROCESSES, micro_batch_size=16)  # two parts of each share
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("the model is in") == 1  # the first process speaks for all
    assert_same_run(trained, tmp_path, 8)
    assert {"preview.png", "figures"} <= set(os.listdir(tmp_path / "run"))


def test_two_processes_go_on_with_the_run_of_one(tmp_path, trained):
    for name in ("one", "two"):
        shutil.copytree(trained / "run", tmp_path / name / "run")
    finished = command_line(tmp_path / "two", *TWO_PROCESSES, resume=True, num_epochs=3)
    assert finished.returncode == 0, finished.stdout
    train(tmp_path / "one", resume=True, num_epochs=3)
    assert_same_run(tmp_path / "one", tmp_path / "two", 12)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(tmp_path):
    finished = command_line(tmp_path, *TWO_PROCESSES, batch_size=7)
    assert finished.returncode and "batch_size 7: must be a multiple of the 2 processes" in finished.stdout


def test_a_bad_parameter_is_one_line_and_a_mistake_in_the_code_has_its_traceback(tmp_path):
    finished = command_line(tmp_path, batch_size=0)
    assert finished.returncode == 1
    assert finished.stdout == "ValueError: batch_size 0: must be a whole number of at least 1\n"
    for mistake in ("int('x')", "{}['x']", "import json; json.loads('{')"):
        with pytest.raises((ValueError, KeyError)) as found:
            run_notebook.run_cell(mistake, "<train.ipynb, cell 1>", {})
        assert not run_notebook.explains_itself(found.value)


def test_an_error_in_one_of_many_processes_ends_it_at_once():
    """At its exit a process group of GPUs would wait for the others, which wait for this process."""
    start = ("import atexit, runpy, sys; atexit.register(print, 'waits for the others'); print('before'); "
             "sys.argv = ['run_notebook.py', 'none.ipynb']; runpy.run_path('run_notebook.py', run_name='__main__')")
    for environment, waits in (({}, True), ({"LOCAL_RANK": "1"}, False)):
        finished = subprocess.run([sys.executable, "-c", start], cwd=ROOT, env=os.environ | environment, text=True,
                                  capture_output=True, timeout=600)
        assert finished.returncode == 1 and "FileNotFoundError" in finished.stderr
        assert finished.stdout.split("\n")[:-1] == ["before"] + ["waits for the others"] * waits


def test_a_notebook_runs_in_its_folder_and_a_typed_path_is_from_where_one_is(tmp_path):
    colours = tmp_path / "colours"
    colours.mkdir()
    for number in range(8):
        Image.new("L", (8, 8), 30 * number).save(colours / f"{number}.png")
    words = ["train.ipynb", "--data_path", "colours", "--save_dir", "mine", "--image_size", "8", "--num_epochs", "1",
             "--batch_size", "4", "--network", "{widths: [8]}", "--initial_weights", "None"]
    finished = subprocess.run([sys.executable, ROOT / "run_notebook.py", ROOT / words[0], *words[1:]],
                              cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    assert finished.returncode == 0, finished.stdout
    assert {"model.pth", "figures"} <= set(os.listdir(tmp_path / "mine"))
    assert set(os.listdir(tmp_path)) == {"colours", "mine"}


def test_parameters_from_the_command_line_are_numbers_lists_and_text():
    assert run_notebook.read_parameters(["--save_dir", "2024", "--label", "true", "--output-dir", "1e3"]) == {
        "save_dir": "2024", "label": "true", "output_dir": "1e3"}
    assert run_notebook.read_parameters(["--label", "None", "--initial_weights", "null"]) == {
        "label": None, "initial_weights": None}
    assert run_notebook.read_parameters(["--learning_rate", "1e-4", "--image-size=[28, 32]", "--resume",
                                         "false", "--data_path", "~/a b", "--network", '{"widths": [8]}',
                                         "--max_images", "None"]) == {
        "learning_rate": 1e-4, "image_size": [28, 32], "resume": False, "data_path": "~/a b",
        "network": {"widths": [8]}, "max_images": None}
    with pytest.raises(ValueError, match="--seed: has no value"):
        run_notebook.read_parameters(["--seed"])
    with pytest.raises(ValueError, match="seed: a parameter is given as --name value"):
        run_notebook.read_parameters(["seed", "3"])
    with pytest.raises(ValueError, match="epochs: no parameter of .*train.ipynb; it has .*num_epochs"):
        run_notebook.run_notebook(ROOT / "train.ipynb", {"epochs": 3})


# As committed

@pytest.mark.parametrize("name", PARAMETERS)
def test_committed_notebooks_are_clean_and_their_outputs_are_of_their_code(name):
    notebook = nbformat.read(name, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert all(cell.execution_count is None for cell in code) and outputs
    assert not any(output.output_type == "error" or output.get("execution_count") for output in outputs)
    assert not re.search(r"/(home|root|Users|tmp|work|mnt)/|[A-Z]:\\\\", json.dumps(notebook))
    assert notebook.metadata["outputs_of"]["code"] == code_digest(notebook)
    assert notebook.metadata["language_info"]["file_extension"] == ".py"
    (parameters,) = (cell for cell in code if "parameters" in cell.metadata.get("tags", []))
    assert re.findall(r"^(\w+) = ", parameters.source, re.M) == PARAMETERS[name].split()
    assert max(len(line) for cell in code for line in cell.source.split("\n")) <= 88


def test_a_run_writes_beside_the_shipped_checkpoint_where_git_ignores_it():
    notebook = nbformat.read("train.ipynb", 4)
    (save_dir,) = re.findall(r'^save_dir = "(.*)"', "\n".join(cell.source for cell in notebook.cells), re.M)
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert any(fnmatch(f"{save_dir}/", pattern) for pattern in ignored)


@pytest.mark.parametrize("page", ["README.md", "Save_model/README.md", "benchmarks/README.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])
def test_every_command_of_a_page_names_files_and_parameters_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = shlex.split(line)
            for word in words:
                if word.endswith((".py", ".ipynb", "requirements.txt")):
                    assert (ROOT / word).exists(), line
            if "run_notebook.py" in words:
                notebook, *parameters = words[words.index("run_notebook.py") + 1:]
                assert set(run_notebook.read_parameters(parameters)) <= set(PARAMETERS[notebook].split())
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
