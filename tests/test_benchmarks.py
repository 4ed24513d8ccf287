"""The measures that the benchmarks report, against closed forms and counting."""

import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import guidance  # noqa: E402
import history  # noqa: E402
import likelihood  # noqa: E402
import measure  # noqa: E402
import quality  # noqa: E402
import recipe as recipes  # noqa: E402
import samplers  # noqa: E402
from common import command, mean_and_each, once, write_page  # noqa: E402
from loops import Images, QuietRun, plain_loss, plain_steps, run_steps  # noqa: E402
from measure import (Classifier, draw, drawn_once, frechet_distance,  # noqa: E402
                     guide_of, load_model, loss_on_test_images, right_digits, unclear)
from quality import (kernel_distance, manifold_measures, nearest,  # noqa: E402
                     two_sample_test)
from recipe import TRAIN_IPYNB, Recipe, loss_function, train  # noqa: E402

from checkpoint import save_checkpoint  # noqa: E402
from model import U_net  # noqa: E402
from noise import NoiseScheduler, image_labels  # noqa: E402
from run_notebook import run_cell, run_notebook  # noqa: E402
from training import Run  # noqa: E402

SCHEDULE = {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
DIGITS = [str(digit) for digit in range(10)]


def random_images(number: int, seed: int = 0, size: int = 28) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, 1, size, size), generator=rng, dtype=torch.uint8)


def small_network(seed: int = 0, num_classes: int = 10) -> U_net:
    """A small network that knows labels, with weights that no layer ignores."""
    torch.manual_seed(seed)
    model = U_net(t_dim=8, widths=(8,), num_classes=num_classes).eval()
    if num_classes:
        nn.init.normal_(model.label_embedding.weight)
    model.metadata = {"image_size": 28, "noise_schedule": SCHEDULE,
                      "classes": DIGITS[:num_classes],
                      "class_counts": [1] * num_classes}
    return model


@pytest.mark.parametrize("name, most", [("model_DDPM", 0.024), ("model_DDPM_large", 0.0215),
                                        ("model_DDPM_guide", 0.038), ("model_DDPM_large_guide", 0.0265)])
def test_a_shipped_network_sees_the_noise_in_test_digits(name, most):
    """Within a few percent of what it is; a network that predicts no noise at all has 1. A mistake in the forward pass
    costs more than that: the larger network with its attention after each block instead of before has 0.023."""
    model = measure.ready(measure.ROOT / "Save_model" / f"{name}.pth")
    assert loss_on_test_images(model, 1000) < most


def test_a_benchmark_draws_as_the_checkpoint_proposes_where_its_guide_is_there(tmp_path):
    path, model = tmp_path / "model.pth", small_network()
    model.metadata["guidance"] = 1.4
    save_checkpoint(model.state_dict(), path)
    for guide, expected in ((False, ("unlabelled", 1)), (True, ("early", 1.4))):
        if guide:
            save_checkpoint(model.state_dict(), measure.guide_path(path))
        args = Namespace(model=path, precision="fp32", guide=None, guidance=None)
        load_model(args)
        assert (args.guide, args.guidance) == expected
    args = Namespace(model=path, precision="fp32", guide="unlabelled", guidance=None)
    load_model(args)
    assert args.guidance == 1  # the proposal is for the early guide


@pytest.mark.skipif(shutil.which("git") is None, reason="asks git")
def test_the_history_of_a_checkpoint_has_the_commits_that_changed_its_weights(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):  # the user's settings
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setattr(history, "ROOT", tmp_path)
    git("init", "-q")
    for seed, guided in ((0, 1.5), (0, 1.75), (1, 1.75)):
        model = small_network(seed)
        model.metadata["guidance"] = guided
        save_checkpoint(model.state_dict(), tmp_path / "Save_model" / "model.pth")
        git("add", ".")
        git("commit", "-qm", f"weights {seed}, guided by {guided}")
    first, second = (commit for commit, _ in history.versions("model.pth"))
    said = [history.git("log", "-1", "--format=%s", commit).decode() for commit in (first, second)]
    assert said == ["weights 0, guided by 1.5\n", "weights 1, guided by 1.75\n"]


def test_a_network_of_other_images_or_classes_is_not_compared_with_mnist(tmp_path):
    path = tmp_path / "model.pth"
    for name, value in (("image_size", 32), ("classes", ["five", "six"])):
        model = small_network()
        model.metadata[name] = value
        save_checkpoint(model.state_dict(), path)
        with pytest.raises(ValueError, match=r"model.pth: .* compare with MNIST"):
            load_model(Namespace(model=path, precision="fp32"))
    save_checkpoint(small_network().state_dict(), path)
    assert load_model(Namespace(model=path, precision="fp32")).network["num_classes"] == 10


class TwoFeatures(torch.nn.Module):
    num_features = 2

    def forward(self, images):
        return images.flatten(1).double()


def test_frechet_distance_is_that_of_two_gaussians():
    """Four points on a diamond have their mean in its centre and a diagonal covariance;
    the root is one of numbers. Standard deviations are a and b times sqrt(2 / 3)."""
    def diamond(x, y, a, b):
        points = [[x + a, y], [x - a, y], [x, y + b], [x, y - b]]
        return torch.tensor(points).view(4, 2, 1, 1)
    expected = 3**2 + 4**2 + (5 - 2)**2 * 2 / 3 + (7 - 7)**2
    here, there = diamond(10, 20, 5, 7), diamond(13, 24, 2, 7)
    found = frechet_distance(TwoFeatures(), here, there)
    assert found == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_images_to_themselves_is_zero():
    images = random_images(300)
    assert frechet_distance(Classifier(), images, images) == pytest.approx(0, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_kernel_distance_is_that_of_features_with_a_mean_square_of_one():
    """Of sets of one point each, whose kernel is (x y / 2 + 1)^3 in two dimensions: (3,
    4) is scaled to a length of sqrt(2)."""
    point, zero = (torch.tensor(xy).byte().view(1, 2, 1, 1).expand(4, -1, -1, -1)
                   for xy in ((3, 4), (0, 0)))
    found = kernel_distance(TwoFeatures(), zero, point)
    assert found == pytest.approx(1000 * (2**3 + 1 - 2 * 1))


def test_precision_recall_density_and_coverage_count_neighbours():
    """Real points 0, 1, 2, 3 on a line reach (k = 1) to distance 1; of the samples 0.5
    and 9 the first lies in two balls. The samples reach to distance 8.5."""
    real, samples = torch.arange(4.0)[:, None], torch.tensor([[0.5], [9.0]])
    measures = manifold_measures(samples, real, k=1)
    assert measures == {"precision": 0.5, "recall": 1.0, "density": 1.0,
                        "coverage": 0.5}


def test_the_nearest_image_is_found():
    reference = random_images(50, size=4)
    images = reference[[7, 31]].clone()
    images[1, 0, 0, 0] ^= 255
    distance, index = nearest(images, reference)
    assert index.tolist() == [7, 31] and distance[0] < 1e-2
    changed = abs(int(images[1, 0, 0, 0]) - int(reference[31, 0, 0, 0])) / 255
    assert distance[1].item() == pytest.approx(changed, abs=1e-2)


def test_a_digit_is_unclear_where_none_has_nine_tenths_on_average(monkeypatch):
    """All three agree on the first three of five images, more or less surely; on the
    others one disagrees, or all do."""
    said = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 2]])
    sure = torch.tensor([0.99, 0.91, 0.89, 0.99, 0.99])

    class Fake:
        def __init__(self, seed):
            self.seed = seed

        def probabilities(self, images):
            others = (1 - sure)[:, None].expand(-1, 10) / 9
            return others.scatter(1, said[self.seed][:, None], sure[:, None])
    monkeypatch.setattr(measure, "classifier", Fake)
    found = measure.mean_probabilities(random_images(5))
    assert unclear(found) == pytest.approx(3 / 5)
    assert right_digits(found, torch.zeros(5).long()).tolist() == [True] * 4 + [False]


def test_probabilities_of_the_ten_digits_sum_to_one():
    probabilities = Classifier().probabilities(random_images(3))
    assert probabilities.shape == (3, 10) and (probabilities > 0).all()
    assert probabilities.sum(dim=1) == pytest.approx(torch.ones(3), abs=1e-6)


def test_a_two_sample_test_tells_black_from_white_and_nothing_from_itself():
    real, other = random_images(200), random_images(200, seed=1)
    found = two_sample_test(real // 2, 128 + other // 2, epochs=5)
    assert found == pytest.approx(1, abs=0.02)
    found = two_sample_test(real, other, epochs=1)
    assert found == pytest.approx(0.5, abs=4 * (0.25 / 200)**0.5)


def test_a_two_sample_test_is_not_led_astray_by_the_order_of_the_images():
    """Both sets are half dark and half bright, but only one of them is sorted, as
    MNIST's test images are by their writers."""
    dark, bright = random_images(100) // 2, 128 + random_images(100, seed=1) // 2
    mixed = torch.stack([dark, bright], dim=1).flatten(0, 1)
    found = two_sample_test(mixed, torch.cat([dark, bright]), epochs=2)
    assert found == pytest.approx(0.5, abs=4 * (0.25 / 200)**0.5)


def test_the_right_digits_are_counted_by_what_was_asked_for(monkeypatch):
    said = torch.arange(20) % 10
    monkeypatch.setattr(quality, "mean_probabilities",
                        lambda images: nn.functional.one_hot(said, 10).float())
    asked = said.clone()
    asked[3] = 4  # one of the two threes was asked to be a four
    text = "\n".join(quality.digits(measure.Drawn(random_images(20), asked, 0.0)))
    assert "95.00%" in text and "3: 100.0%" in text and "4: 66.7%" in text
    unlabelled = quality.digits(measure.Drawn(random_images(20), None, 0.0))
    assert "asked" not in "\n".join(unlabelled)


def test_black_pixels_are_counted(monkeypatch):
    monkeypatch.setattr(quality, "two_sample_test", lambda images, real: 0.75)
    monkeypatch.setattr(quality, "mnist", lambda part: torch.zeros(2, 1, 2, 2).byte())
    drawn = torch.tensor([0, 0, 1, 2, 3, 3, 3, 3]).byte().view(2, 1, 2, 2)
    text = " ".join(quality.told_apart(drawn))
    assert "25.0% of the samples" in text and "100.0% of the test" in text
    assert "at most two of 255 levels brighter: 50.0% and 100.0%" in text


def test_classification_accuracy_is_that_on_real_digits_of_what_was_learnt(monkeypatch):
    """Digit d has a bright row number 2 d. What is learnt from wrong labels is
    wrong."""
    labels = torch.arange(200) % 10
    images = random_images(200) // 4
    images[torch.arange(200), 0, 2 * labels] = 255
    monkeypatch.setattr(quality, "mnist", lambda part: images)
    monkeypatch.setattr(quality, "mnist_labels", lambda part: labels)
    monkeypatch.setattr(quality, "JUDGES", range(1))
    monkeypatch.setattr(quality, "CAS", {"epochs": 8})
    assert quality.classification_accuracy(images, labels, "right") == [1.0]
    assert quality.classification_accuracy(images, (labels + 1) % 10, "wrong") == [0.0]


def test_the_page_says_how_many_times_the_errors_of_real_digits(monkeypatch, tmp_path):
    found = {"real": [0.99, 0.98], "samples": [0.97, 0.98]}
    monkeypatch.setattr("common.CACHE", tmp_path)
    monkeypatch.setattr(quality, "classification_accuracy",
                        lambda images, labels, name: found[name])
    drawn = measure.Drawn(random_images(4), torch.arange(4), 0.0)
    text = "\n".join(quality.about_cas(drawn, ()))
    assert "97.50% (97.00%, 98.00%)" in text and "1.67 x the errors" in text


def test_r_is_the_median_of_the_ratios_to_the_median_of_real_sets(monkeypatch):
    sets = [[1.0, 1.0, 10.0], [2.0, 4.0, 10.0], [9.0, 9.0, 10.0]]  # medians 2, 4 and 10
    monkeypatch.setattr(measure, "training_distances", lambda number: sets)
    found = measure.relative_distance([6.0, 8.0, 50.0], 3)  # of 3, 2 and 5
    assert found == pytest.approx(3.0)
    assert measure.training_distance(3) == pytest.approx(4.0)  # of 1, 4, 9


def test_the_loss_of_a_network_that_predicts_zero_is_the_variance_of_the_noise():
    class Zero(nn.Module):
        network, metadata, seen = {"num_classes": 10}, {"noise_schedule": SCHEDULE}, []

        def forward(self, x, t, label):
            self.seen.append(label)
            return torch.zeros_like(x)
    model = Zero()
    assert loss_on_test_images(model, 500) == pytest.approx(1, abs=0.02)
    assert torch.equal(torch.cat(model.seen), measure.mnist_labels("t10k")[:500])


# Likelihood

class Nothing(nn.Module):
    """A network that predicts zero: every error is the noise, of variance 1."""
    metadata = {"noise_schedule": SCHEDULE}

    def forward(self, x, t, label):
        return torch.zeros_like(x)


def paper_snr(times) -> torch.Tensor:
    """The ratio at times, where a step of the paper is one of equal parts."""
    alpha = 1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = [math.prod(alpha[:int(time) + 1].tolist())
                 * alpha[min(int(time) + 1, 999)].item()**(time % 1) for time in times]
    return torch.tensor([a / (1 - a) for a in alpha_bar], dtype=torch.float64)


def test_the_signal_to_noise_ratio_is_known_at_real_times():
    predict = likelihood.Predictions(Nothing(), 0)
    times = [0.0, 0.25, 1.0, 17.5, 500.125, 999.0]
    found = predict.snr(torch.tensor(times))
    torch.testing.assert_close(found, paper_snr(times), rtol=1e-6, atol=0)


@pytest.mark.parametrize("stretch, split", [((1, 2), 1), ((4, 6), 1), ((4, 6), 8),
                                            ((450, 550), 1)])
def test_a_stretch_of_steps_costs_what_its_steps_cost_on_average(stretch, split):
    first, end = stretch
    snr = paper_snr([first - 1 + i / split for i in range((end - first) * split + 1)])
    expected = ((snr[:-1] / snr[1:] - 1) / 2).sum().item() / math.log(2)
    x, label = random_images(400).float() / 127.5 - 1, torch.zeros(400).long()
    predict = likelihood.Predictions(Nothing(), 0)
    nothing = torch.zeros(len(likelihood.TIMES), likelihood.NUM_KEYS)
    plain, _ = likelihood.bits_of_steps(predict, nothing, x, label, stretch, split,
                                        torch.Generator().manual_seed(0))
    error = plain.std().item() / 20
    assert abs(plain.mean().item() - expected) < max(0.01 * expected, 4 * error)
    assert plain.std().item() < 0.5 * expected


def test_the_counted_last_step_sums_to_one_and_knows_what_was_counted():
    x = random_images(50).float() / 127.5 - 1
    predicted = torch.where(x > 0, x - 40 / 127.5, x)  # bright pixels are 40 levels off
    p, width = likelihood.last_step(x, predicted)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(likelihood.NUM_KEYS))
    assert (p > 0).all()
    counted = likelihood.bits_of_last_step(p, x, predicted).mean()
    single = -likelihood.discretised_gaussian(x, predicted, width / 127.5).mean()
    assert counted < single / math.log(2) / 2


def test_a_correction_is_the_mean_of_what_lacks():
    x = torch.full((100, 1, 8, 8), -1.0)
    predicted = x + 3 / 127.5
    added = likelihood.correction(x, predicted)[likelihood.keys(predicted)]
    torch.testing.assert_close(added, torch.full_like(x, -3 / 127.5), rtol=0.01, atol=0)
    assert likelihood.correction(x, predicted)[likelihood.keys(x)].abs().max() == 0


def test_fine_tuning_for_the_bound_draws_times_evenly_and_leaves_the_network(monkeypatch):
    """Evenly in the logarithm of the ratio, nine tenths of them up to t = 200."""
    model, seen, clock = small_network(), [], count(step=0.1)
    monkeypatch.setattr(likelihood, "monotonic", lambda: next(clock))
    before = {name: value.clone() for name, value in model.state_dict().items()
              if isinstance(value, torch.Tensor)}
    forward = U_net.forward
    monkeypatch.setattr(U_net, "forward", lambda self, x, t, label: seen.append(t)
                        or forward(self, x, t, label))
    tuned = likelihood.fine_tuned(model, 0.03, 0)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(tuned.state_dict()["out.weight"], before["out.weight"])
    times = torch.cat(seen)
    assert len(seen) > 3 and 0 <= times.min() and times.max() < 999
    assert (times <= 200).double().mean().item() == pytest.approx(0.9, abs=0.05)
    log_snr = paper_snr(times[times <= 200].tolist()).log()
    middle = (paper_snr([0.0]).log() + paper_snr([200.0]).log()).item() / 2
    assert (log_snr > middle).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_bound_takes_each_step_once():
    """With parts that are the number of their steps: the steps from the last one on."""
    found = {"prior": torch.zeros(1)} | {
        f"last, {name}": torch.ones(1) for name in ("beta", "later")}
    for name, edges in (("far", likelihood.COARSE), ("near", likelihood.FINE)):
        for first, end in zip(edges, edges[1:]):
            found[f"{name}, {first}"] = torch.tensor([float(end - first)])
    assert likelihood.total(found, "beta", "near").item() == 1000
    assert likelihood.total(found, "later", "near", start=9).item() == 1000 - 8


# Drawing

@pytest.mark.parametrize("num_classes, early, guidance", [
    (10, True, 1.5), (10, False, 2.0), (10, True, 1.0), (0, True, 1.25)])
def test_draw_draws_what_the_notebook_draws(tmp_path, monkeypatch, num_classes, early,
                                            guidance):
    model, guide = small_network(0, num_classes), small_network(1, num_classes)
    for network in (model, guide):
        network.metadata["noise_schedule"] = SCHEDULE | {"num_timesteps": 16}
    path = tmp_path / "model.pth"
    save_checkpoint(model.state_dict(), path)
    if early:
        save_checkpoint(guide.state_dict(), measure.guide_path(path))
    run_notebook(Path(measure.ROOT, "generate_image.ipynb"), {
        "model_path": str(path), "num_images": 5, "seed": 3, "num_steps": 4,
        "guidance": guidance, "precision": "fp32", "output_dir": str(tmp_path)})
    guide = guide_of(path, model, "early" if early else "unlabelled")
    found = draw(model, range(5), 3, 4, guide=guide, guidance=guidance)
    files = [np.array(Image.open(tmp_path / f"x_{i}.png")) for i in range(5)]
    assert torch.equal(found.pixels[:, 0], torch.from_numpy(np.stack(files)))
    part = draw(model, range(2, 4), 3, 4, guide=guide, guidance=guidance)
    assert (part.pixels.int() - found.pixels[2:4].int()).abs().max() <= 1
    classes = DIGITS[:num_classes]
    expected = image_labels(None, 3, range(5), classes, [1] * num_classes)
    assert (found.labels is expected is None) or torch.equal(found.labels, expected)


def test_spacing_moves_the_timesteps_of_a_drawing():
    model, visited = small_network(), []
    forward = model.forward
    model.forward = lambda x, t, label=None: (visited.append(t[0].item()),
                                              forward(x, t, label))[1]
    draw(model, range(1), 0, 4, spacing=2.0)
    assert visited == [999, 561, 249, 61]  # 1000 (1 - i / 4)^2 - 1, rounded


def test_the_guide_is_not_asked_for_the_last_prediction():
    model, guide, asked = small_network(), small_network(1), {}
    for name, network in (("model", model), ("guide", guide)):
        def forward(x, t, label=None, name=name, forward=network.forward):
            asked.setdefault(name, []).append(t[0].item())
            return forward(x, t, label)
        network.forward = forward
    draw(model, range(1), 0, 4, guide=guide, guidance=2.0)
    assert asked == {"model": [999, 749, 499, 249], "guide": [999, 749, 499]}


def test_a_guide_that_is_not_there_is_an_error(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(FileNotFoundError, match="model_guide.pth"):
        guide_of(path, small_network(), "early")
    with pytest.raises(ValueError, match="model.pth knows no labels"):
        guide_of(path, small_network(num_classes=0), "unlabelled")


def test_samples_are_kept_under_everything_that_decides_them(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "CACHE", tmp_path)
    model, path = small_network(), tmp_path / "model.pth"
    save_checkpoint(model.state_dict(), path)
    save_checkpoint(small_network(1).state_dict(), measure.guide_path(path))
    made = []
    monkeypatch.setattr(measure, "draw", lambda *args, **options: made.append(options)
                        or draw(*args, **options))

    def again(images=range(3), seed=0, steps=2, **options):
        return drawn_once(path, model, images, seed, steps, **options)
    first = again()
    for same in ({}, {"spacing": 1.0}, {"guide": "unlabelled"}):
        assert torch.equal(again(**same).pixels, first.pixels)
    assert len(made) == 1 and torch.equal(again().labels, first.labels)
    others = [{"spacing": 1.5}, {"guidance": 2.0}, {"guidance": 2.0, "guide": "unlabelled"}]
    found = [again(**other) for other in others]
    assert len(made) == 4 and not torch.equal(found[1].pixels, found[2].pixels)
    others = ({"images": range(4)}, {"seed": 1}, {"steps": 3}, {"sampler": "ddim"}, {"eta": 0.0},
              {"precision": "bf16"})
    for number, other in enumerate(others, start=5):
        again(**other)
        assert len(made) == number
    save_checkpoint(small_network(2).state_dict(), measure.guide_path(path))
    again()
    again(guidance=2.0)
    assert len(made) == 11  # the guide decides where it guides
    save_checkpoint(small_network(3).state_dict(), path)
    again()
    assert len(made) == 12
    monkeypatch.setattr(measure, "machine_in_words", lambda: "another one")
    again()
    assert len(made) == 13


def test_drawing_that_was_stopped_goes_on_after_the_last_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "CACHE", tmp_path)
    model, path = small_network(), tmp_path / "model.pth"
    save_checkpoint(model.state_dict(), path)
    whole, parts = draw(model, range(1003), 5, 1), []

    def stopped(model, images, *args, **options):
        parts.append(images)
        if len(parts) == 2:
            raise KeyboardInterrupt
        return draw(model, images, *args, **options)
    monkeypatch.setattr(measure, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        drawn_once(path, model, range(1003), 5, 1)
    found = drawn_once(path, model, range(1003), 5, 1)
    assert parts == [range(1000), range(1000, 1003), range(1000, 1003)]
    assert torch.equal(found.pixels, whole.pixels) and torch.equal(found.labels, whole.labels)
    assert found.seconds > drawn_once(path, model, range(1000), 5, 1).seconds


def test_the_table_of_samplers_has_those_asked_for(monkeypatch):
    """A guided step evaluates two networks, but the last one; the whole walk is that of ddpm alone."""
    asked = []
    monkeypatch.setattr(samplers, "drawn_once", lambda *args, precision, **options: asked.append(options)
                        or measure.Drawn(torch.zeros(1), None, 1.0))
    monkeypatch.setattr(samplers, "distance_to_test", lambda pixels: 2.5)
    args = Namespace(model=Path("a.pth"), samples=5, seed=0, precision="fp32", steps=[10, 1000], guide="early",
                     guidance=1.5, samplers=["ddpm", "dpm_solver, guided", "dpm_solver, spacing 1.5"])
    assert samplers.measured(args, None) == [
        ("ddpm", 10, 10, 2.5), ("dpm_solver, guided", 10, 19, 2.5), ("dpm_solver, spacing 1.5", 10, 10, 2.5),
        ("ddpm", 1000, 1000, 2.5)]
    assert asked == [{}, {"guide": "early", "guidance": 1.5}, {"spacing": 1.5}, {}]
    args = Namespace(**vars(args) | {"samplers": None, "guidance": 1, "steps": [3, 100]})  # all, and no guide
    assert [name for name, *_ in samplers.measured(args, None)] == [
        "ddpm", "ddim", "dpm_solver", "dpm_solver, eta 0", "dpm_solver, eta 0.7", "dpm_solver, spacing 1.5",
        "ddpm", "dpm_solver"]  # in many steps, the two to compare with


def test_the_table_of_guidance_has_each_with_each(monkeypatch):
    """Without a guide, the kind of guide makes no difference: that row comes once."""
    pages = []
    for name, fake in {"load_model": lambda args: small_network(),
                       "measured": lambda args, model, seed, *_, **how: (seed, 0.25, 0.5, 0.75, 1),
                       "recall_of": lambda images: 0.9,
                       "about_distance": lambda *_: [], "about_unclear": lambda: [],
                       "write_page": lambda name, args, lines, _: pages.append(lines),
                       }.items():
        monkeypatch.setattr(guidance, name, fake)
    words = ("guidance.py model.pth --seed 1 2 --guide early unlabelled "
             "--guidance 1 1.5 --spacing 1 2 --steps 5")
    monkeypatch.setattr("sys.argv", words.split())
    guidance.main()
    table = [line for line in pages[0] if line.startswith("| ")]
    assert table[0].endswith("| evaluations | R | recall | unclear | black | right digit |")
    assert table[1] == ("| none | 1 | 1 | 5 | 5 | 1.500 (1.000, 2.000) | 0.250 (0.250, 0.250) | "
                        "50.0% (50.0%, 50.0%) | 75.0% (75.0%, 75.0%) | "
                        "100.0% (100.0%, 100.0%) |")
    assert [row.split(" | ")[0] for row in table[1:]] == (
        ["| none"] * 2 + ["| early"] * 2 + ["| unlabelled"] * 2)
    assert all(" | 5 | 9 | " in row for row in table[3:])


# Training

def test_the_plain_loop_and_that_of_the_notebook_take_steps(tmp_path):
    data = Images(random_images(8), torch.arange(8))
    model = small_network().train()
    steps = plain_steps(model, data.random_batches(4))
    losses = [loss for loss, _ in islice(steps, 30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    run = Run(model, data, batch_size=4, learning_rate=1e-3, num_epochs=3, seed=0,
              save_dir=tmp_path, use_labels=True)
    assert len(list(run_steps(run, plain_loss(model, NoiseScheduler())))) == 6
    assert len(run.losses) == 6


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_learning_rate_of_a_recipe_is_that_of_the_time(decay, monkeypatch):
    """A clock that goes on by 0.05 s at each look makes a step 0.05 s long."""
    runs, clock = [], count(step=0.05)
    tick = partial(next, clock)
    monkeypatch.setattr(recipes, "time",
                        SimpleNamespace(process_time=tick, perf_counter=tick))
    monkeypatch.setattr(recipes, "QuietRun", lambda *args, **options: runs.append(
        QuietRun(*args, **options)) or runs[-1])
    recipe = Recipe(network={"widths": (8,)}, batch_size=4, learning_rate=0.002,
                    decay=decay)
    rates, looks = [], []
    for seconds, seen, *_ in train(recipe, 1.0, looks=(0.5, 1.0)):
        looks.append((pytest.approx(seconds), seen))
        rates.append(runs[0].training_step.optimizer.param_groups[0]["lr"].item())
    assert looks == [(0.5, 40), (1.0, 80)]  # four images a step
    if decay == "constant":
        assert rates == [pytest.approx(0.002)] * 2
    else:
        expected = [0.001 * (1 + math.cos(math.pi * share)) for share in (0.45, 0.95)]
        assert rates == pytest.approx(expected)
    run = runs[0]
    for average, weight in zip(run.average.parameters(), run.model.parameters()):
        torch.testing.assert_close(average, weight)  # no average was asked for


def test_a_run_that_diverges_has_no_distance(monkeypatch, tmp_path):
    def diverges(*args, **options):
        raise FloatingPointError("step 3: the gradient is not finite")
        yield
    monkeypatch.setattr("common.CACHE", tmp_path)
    monkeypatch.setattr(recipes, "train", diverges)
    assert recipes.result(Recipe(), 1, 10, False) == (float("inf"), float("inf"), 0)


def test_the_recipe_of_the_notebook_has_its_loss():
    """Of the same network and noise, train.ipynb's loss and that of the recipe."""
    notebook = nbformat.read(Path(__file__).parents[1] / "train.ipynb", 4)
    model, scheduler = U_net(t_dim=8, widths=(8,)), NoiseScheduler()
    names = {"model": model, "scheduler": scheduler, "alpha_bar": scheduler.alpha_bar}
    (source,) = (cell.source for cell in notebook.cells if "def loss_of" in cell.source)
    run_cell(source, "<loss>", names)
    x0, noise = torch.randn(2, 4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 50, 400, 999])
    ours = loss_function(TRAIN_IPYNB, model, scheduler)(x0, noise, t)
    torch.testing.assert_close(names["loss_of"](x0, noise, t, None), ours)


# Pages

def test_a_page_begins_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr("common.ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/guidance.py"])
    (tmp_path / "benchmarks").mkdir()
    args = Namespace(model=Path("a.pth"), steps=[5, 10], guide=None, samplers=["ddpm", "dpm_solver, eta 0"])
    assert command(args) == "python benchmarks/guidance.py a.pth --steps 5 10 --samplers ddpm 'dpm_solver, eta 0'"
    write_page("page", args, ["one", "two"], ":")
    first, *rest = (tmp_path / "benchmarks" / "page.md").read_text().splitlines()
    assert first.startswith(f"`{command(args)}` on ") and first.endswith(":")
    assert rest == ["", "one", "two"]


def test_what_was_found_once_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setattr("common.CACHE", tmp_path)
    calls = []
    for key in (("a", 1), ("a", 1), ("a", 2)):
        found = once("name", key, lambda: calls.append(key) or [*key, None])
        assert found == [*key, None]
    assert calls == [("a", 1), ("a", 2)]
    monkeypatch.setattr("common.fingerprint", lambda *_: ["another model.py"])
    once("name", ("a", 2), lambda: calls.append("anew") or [])
    assert calls[2:] == ["anew"]
    assert mean_and_each([0.5], ".1f") == "0.5"
    assert mean_and_each([1, 2], ".1f") == "1.5 (1.0, 2.0)"
