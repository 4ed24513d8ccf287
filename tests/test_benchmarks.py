"""The measures that the benchmarks report, against closed forms and counting."""

import sys
from pathlib import Path

import nbformat
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from measure import Classifier, NoiseScheduler, U_net, frechet_distance, unclear  # noqa: E402
from quality import (kernel_distance, manifold_measures, nearest, right_digits,  # noqa: E402
                     two_sample_test)
from recipe import (TRAIN_IPYNB, NoiseOfVelocity, Recipe, loss_function, train,  # noqa: E402
                    velocity)
from run_notebook import run_cell  # noqa: E402


class TwoFeatures(torch.nn.Module):
    num_features = 2

    def forward(self, images):
        return images.flatten(1).double()


def test_frechet_distance_is_that_of_two_gaussians():
    """Four points on a diamond have their mean in its centre and a diagonal covariance; the root is one of numbers."""
    def diamond(x, y, a, b):
        return torch.tensor([[x + a, y], [x - a, y], [x, y + b], [x, y - b]]).view(4, 2, 1, 1)
    expected = 3**2 + 4**2 + (5 - 2)**2 * 2 / 3 + (7 - 7)**2  # standard deviations are a and b times sqrt(2 / 3)
    found = frechet_distance(TwoFeatures(), diamond(10, 20, 5, 7), diamond(13, 24, 2, 7))
    assert found == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_images_to_themselves_is_zero():
    images = torch.randint(256, (300, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert frechet_distance(Classifier(), images, images) == pytest.approx(0, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")  # eight points
def test_kernel_distance_is_that_of_features_with_a_mean_square_of_one():
    """Of sets of one point each, whose kernel is (x y / 2 + 1)^3 in two dimensions: (3, 4) is scaled to a length of sqrt(2)."""
    point, zero = (torch.tensor(xy, dtype=torch.uint8).view(1, 2, 1, 1).expand(4, -1, -1, -1) for xy in ((3, 4), (0, 0)))
    assert kernel_distance(TwoFeatures(), zero, point) == pytest.approx(1000 * (2**3 + 1 - 2 * 1))


def test_the_velocity_gives_its_noise_back():
    scheduler, t = NoiseScheduler(), torch.tensor([0, 300, 999])
    x0, noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_bar = scheduler.alpha_bar[t].view(-1, 1, 1, 1)
    angle = alpha_bar.sqrt().arccos()
    expected = angle.cos() * noise - angle.sin() * x0  # Salimans and Ho 2022, section 4
    torch.testing.assert_close(velocity(x0, noise, alpha_bar), expected, rtol=1e-4, atol=1e-4)

    class Velocity(torch.nn.Module):
        network = metadata = {}

        def forward(self, x, t):
            return expected
    found = NoiseOfVelocity(Velocity(), scheduler.alpha_bar)(scheduler.add_noise(x0, noise, t), t)
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-4)


def test_precision_recall_density_and_coverage_count_neighbours():
    """Real points 0, 1, 2, 3 on a line reach (k = 1) to distance 1; of the samples 0.5 and 9 the first lies in two balls."""
    real, samples = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.5], [9.0]])
    measures = manifold_measures(samples, real, k=1)
    assert measures == {"precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": 0.5}  # samples reach to 8.5


def test_the_nearest_image_is_found():
    reference = torch.randint(256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = reference[[7, 31]].clone()
    images[1, 0, 0, 0] ^= 255
    distance, index = nearest(images, reference)
    assert index.tolist() == [7, 31] and distance[0] < 1e-2
    changed = abs(int(images[1, 0, 0, 0]) - int(reference[31, 0, 0, 0])) / 255
    assert distance[1].item() == pytest.approx(changed, abs=1e-2)


def test_a_digit_is_unclear_where_the_mean_of_the_classifiers_gives_none_a_probability_of_nine_tenths(monkeypatch):
    """All three agree on the first three of five images, more or less surely; on the others one disagrees, or all do."""
    said = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 2]])
    sure = torch.tensor([0.99, 0.91, 0.89, 0.99, 0.99])

    class Fake:
        def __init__(self, seed):
            self.seed = seed

        def probabilities(self, images):
            others = (1 - sure)[:, None].expand(-1, 10) / 9
            return others.scatter(1, said[self.seed][:, None], sure[:, None])
    monkeypatch.setattr("measure.classifier", Fake)
    assert unclear(torch.zeros(5, 1, 28, 28, dtype=torch.uint8)) == pytest.approx(3 / 5)


def test_probabilities_of_the_ten_digits_sum_to_one():
    images = torch.randint(256, (3, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    probabilities = Classifier().probabilities(images)
    assert probabilities.shape == (3, 10) and (probabilities > 0).all()
    assert probabilities.sum(dim=1) == pytest.approx(torch.ones(3), abs=1e-6)


def test_a_two_sample_test_tells_black_from_white_and_nothing_from_itself():
    real = torch.randint(256, (400, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    other = torch.randint(256, (400, 1, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert two_sample_test(real // 2, 128 + other // 2, epochs=8) == pytest.approx(1, abs=0.02)
    assert two_sample_test(real, other, epochs=2) == pytest.approx(0.5, abs=4 * (0.25 / 400)**0.5)


def test_the_right_digits_are_counted_by_what_was_asked_for(monkeypatch):
    said = torch.arange(20) % 10
    monkeypatch.setattr("quality.mean_probabilities", lambda _: torch.nn.functional.one_hot(said, 10).float())
    asked = said.clone()
    asked[3] = 4  # one of the two threes was asked to be a four
    (line, _) = right_digits(torch.zeros(20, 1, 28, 28), asked)
    assert "95.00%" in line and "3: 100.0%" in line and "4: 66.7%" in line


def test_the_recipe_of_the_notebook_has_its_loss():
    """Of the same network and noise, train.ipynb's loss and that of the benchmark's recipe."""
    notebook = nbformat.read(Path(__file__).parents[1] / "train.ipynb", 4)
    model, scheduler = U_net(t_dim=8, widths=(8,)), NoiseScheduler()
    names = {"model": model, "scheduler": scheduler, "alpha_bar": scheduler.alpha_bar}
    (source,) = (cell.source for cell in notebook.cells if "def loss_of" in cell.source)
    run_cell(source, "<loss>", names)
    x0, noise = torch.randn(2, 4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 50, 400, 999])
    ours = loss_function(TRAIN_IPYNB, model, scheduler)(x0, noise, t)
    torch.testing.assert_close(names["loss_of"](x0, noise, t, None), ours)


def test_training_for_a_time_looks_when_asked():
    recipe = Recipe(network={"widths": (8,)}, batch_size=4, ema=0.9)
    looks = [(seconds, seen) for seconds, seen, *_ in train(recipe, 0.5, looks=(0.5, 1.0))]
    assert [seconds >= least for (seconds, _), least in zip(looks, (0.25, 0.5))] == [True, True]
    assert 0 < looks[0][1] < looks[1][1]
