"""What edit_image.ipynb needs of noise.py, on Gaussian images.

Where x_0 ~ N(m, S), the best prediction of the noise is known:
ε*(x_t, t) = √(1 - ᾱ) (ᾱ S + (1 - ᾱ) I)⁻¹ (x_t - √ᾱ m). It stands for the network here.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from noise import (NoiseScheduler, discretised_gaussian, gaussian_noise,
                   image_generators, resampling_walk, slerp)

LEVELS = torch.arange(256).double() / 127.5 - 1


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def alpha_bars(scheduler):
    """alpha_bar from t = -1 on, as the paper defines it."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(scheduler.beta.double(), betas, atol=1e-8)
    return [1.0, *(1 - betas).cumprod(0).tolist()]


def best_predictor(scheduler, mean, variance):
    """ε* for images whose pixels are independent, N(mean, variance) each."""
    alpha_bar = (1 - scheduler.beta.double()).cumprod(0)

    def predict(x, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * variance + 1 - a)
    return predict


# There and back

def test_noise_added_in_two_steps_has_the_moments_of_one():
    scheduler, n = NoiseScheduler(), 100_000
    xs = scheduler.renoise_step(torch.full((n, 1), 0.7).double(), -1, 300, rng())
    xt = scheduler.renoise_step(xs, 300, 450, rng(1))
    alpha_bar = alpha_bars(scheduler)[451]
    assert abs(xt.mean() - alpha_bar**0.5 * 0.7) < 4 * math.sqrt((1 - alpha_bar) / n)
    assert abs(xt.var() - (1 - alpha_bar)) < 4 * (1 - alpha_bar) * math.sqrt(2 / n)
    for at in (-1, 300):
        assert torch.equal(scheduler.renoise_step(xs, at, at, rng()), xs)
    with pytest.raises(ValueError, match="noise from timestep 300 to 299"):
        scheduler.renoise_step(xs, 300, 299)


def test_a_step_of_noise_may_differ_from_image_to_image():
    scheduler, x = NoiseScheduler(), torch.randn(3, 1, 8, 8, generator=rng())
    s, t = torch.tensor([-1, 10, 500]), torch.tensor([0, 10, 999])
    together = scheduler.renoise_step(x, s, t, image_generators(0, range(3)))
    alone = [scheduler.renoise_step(x[i:i + 1], int(s[i]), int(t[i]),
                                    image_generators(0, range(i, i + 1)))
             for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_inversion_finds_the_noise_that_the_differential_equation_leads_to():
    """For a Gaussian it keeps the number of standard deviations from the mean."""
    scheduler, mean, variance = NoiseScheduler(), 0.3, 0.04
    predict = best_predictor(scheduler, mean, variance)
    x0 = mean + 0.2 * torch.randn(50, 1, 2, 2, generator=rng()).double()
    alpha_bar = alpha_bars(scheduler)[-1]
    exact = alpha_bar**0.5 * mean + (x0 - mean) / 0.2 * math.sqrt(
        alpha_bar * variance + 1 - alpha_bar)
    to_noise, to_image = [], []
    for num_steps in (50, 100, 200):
        *_, (t, xt) = scheduler.invert(predict, x0, num_steps)
        *_, (_, back) = scheduler.denoise(predict, xt, num_steps, "ddim")
        assert t == 999
        to_noise.append((xt - exact).abs().max().item())
        to_image.append((back - x0).abs().max().item())
    for errors in (to_noise, to_image):  # of first order: half the step, half the error
        assert errors[2] < 0.1
        assert all(0.4 < after / before < 0.6 for before, after in pairwise(errors))


def test_inversion_visits_the_timesteps_of_the_way_down_and_names_bad_numbers():
    scheduler, x0 = NoiseScheduler(), torch.zeros(1, 1, 8, 8)
    visited = [t for t, _ in scheduler.invert(lambda x, t: x, x0, 7)]
    assert visited == scheduler.timesteps(7)[-2::-1]
    with pytest.raises(ValueError, match="not finite"):
        list(scheduler.invert(lambda x, t: x / 0, x0, 7))


# From one to another

def test_slerp_is_the_arc_between_two_noises():
    a, b = torch.randn(2, 5, 1, 8, 8, generator=rng()).double()
    torch.testing.assert_close(slerp(a, b, 0), a)
    torch.testing.assert_close(slerp(a, b, 1), b)
    a, b = (F.normalize(x.flatten(1)) * 8 for x in (a, b))
    for weight in (0.1, 0.5, 0.8):
        between = slerp(a, b, weight)
        torch.testing.assert_close(between.norm(dim=1), a.norm(dim=1))
        angles = [F.cosine_similarity(a, x).arccos() for x in (b, between)]
        torch.testing.assert_close(angles[1], weight * angles[0])


def test_slerp_between_equals_is_what_they_are():
    a = torch.randn(2, 1, 8, 8, generator=rng())
    torch.testing.assert_close(slerp(a, a, 0.3), a)


# A hole in an image

MEAN, COVARIANCE = np.array([0.2, -0.1]), np.array([[0.25, 0.15], [0.15, 0.25]])
KNOWN = 0.9


def pair_predictor(scheduler):
    """ε* for images of two pixels, N(MEAN, COVARIANCE)."""
    alpha_bar = alpha_bars(scheduler)

    def predict(x, t):
        a = alpha_bar[int(t[0]) + 1]
        inverse = np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(2))
        inverse = torch.tensor(math.sqrt(1 - a) * inverse)
        return (x - torch.tensor(a**0.5 * MEAN)) @ inverse
    return predict


def completions(num_steps, jump, repeats, n=1000):
    """The unknown second pixel, beside a first one that is KNOWN: (n,)."""
    scheduler = NoiseScheduler()
    known = torch.full((n, 1, 1, 2), KNOWN, dtype=torch.float64)
    mask = torch.tensor([[True, False]])
    xt = gaussian_noise(known, rng())
    *_, (t, x0) = scheduler.inpaint(pair_predictor(scheduler), xt, known, mask,
                                    num_steps, jump, repeats, rng(1))
    assert t == -1 and (x0[..., 0] == KNOWN).all()
    return x0[..., 1].flatten()


def law_of_repaint(num_steps, jump, repeats):
    """Mean and variance of the second pixel after Algorithm 1 of Lugmayr et al. 2022.

    Every step of it is linear with Gaussian noise, so the moments follow from matrices.
    """
    scheduler = NoiseScheduler()
    alpha_bar, one = alpha_bars(scheduler), np.eye(2)
    mean, covariance = np.zeros(2), one
    walk = resampling_walk(scheduler.timesteps(num_steps), jump, repeats)
    for t, s in pairwise(walk):
        a_t, a_s = alpha_bar[t + 1], alpha_bar[s + 1]
        if s > t:
            alpha = a_s / a_t
            mean, covariance = alpha**0.5 * mean, alpha * covariance + (1 - alpha) * one
            continue
        # The posterior of x_0 given x_t, then q(x_s given x_t, x_0) of Eq. 6 and 7
        gain = a_t**0.5 * COVARIANCE @ np.linalg.inv(a_t * COVARIANCE + (1 - a_t) * one)
        beta = 1 - a_t / a_s
        of_x0 = a_s**0.5 * beta / (1 - a_t)
        of_xt = (a_t / a_s)**0.5 * (1 - a_s) / (1 - a_t)
        step = of_x0 * gain + of_xt * one
        mean = step @ mean + of_x0 * (MEAN - a_t**0.5 * gain @ MEAN)
        covariance = step @ covariance @ step.T + (1 - a_s) / (1 - a_t) * beta * one
        mean[0] = a_s**0.5 * KNOWN  # the known pixel is drawn anew, on its own
        covariance = np.diag([1 - a_s, covariance[1, 1]])
    return mean[1], covariance[1, 1]


def deviations(values, mean, variance):
    """How many standard errors the mean and the variance of the values are off."""
    n = len(values)
    return (abs(values.mean().item() - mean) / math.sqrt(variance / n),
            abs(values.var().item() - variance) / (variance * math.sqrt(2 / n)))


@pytest.mark.parametrize("walk", [(50, 5, 1), (50, 5, 5), (40, 7, 3), (1000, 20, 1)])
def test_completions_follow_the_law_of_the_papers_algorithm(walk):
    assert max(deviations(completions(*walk, n=4000), *law_of_repaint(*walk))) < 4


def test_completions_are_drawn_from_the_conditional_but_not_without_resampling():
    """Nearly: the algorithm's own error is one standard error of so many here."""
    mean = MEAN[1] + 0.15 / 0.25 * (KNOWN - MEAN[0])
    variance = 0.25 - 0.15**2 / 0.25
    assert max(deviations(completions(500, 10, 10, n=400), mean, variance)) < 4
    assert deviations(completions(500, 10, 1, n=400), mean, variance)[0] > 7


def test_the_walk_of_resampling_goes_up_and_down():
    down = [5, 3, 1, 0, -1]
    assert resampling_walk(down, 10, 1) == down
    assert resampling_walk(down, 2, 2) == [5, 3, 1, 5, 3, 1, 0, -1, 1, 0, -1]
    assert resampling_walk([4, 2, 0, -1], 2, 3) == [
        4, 2, 0, 4, 2, 0, 4, 2, 0, -1, 0, -1, 0, -1]
    with pytest.raises(ValueError, match="jump 0, repeats 1"):
        resampling_walk([1, 0, -1], 0, 1)


ALL = torch.ones(8, 8, dtype=torch.bool)


@pytest.mark.parametrize("known, mask, message", [
    ((2, 1, 9, 9), ALL, r"\(2, 1, 9, 9\): must be \(2, 1, 8, 8\)"),
    ((2, 3, 8, 8), ALL, r"\(2, 3, 8, 8\): must be"),
    ((2, 1, 8, 8), ALL[:, :7], r"mask of shape \(8, 7\)"),
    ((2, 1, 8, 8), ALL.float(), "torch.float32: must be .* and torch.bool")])
def test_a_hole_of_another_shape_is_refused(known, mask, message):
    with pytest.raises(ValueError, match=message):
        NoiseScheduler().inpaint(lambda x, t: x, torch.zeros(2, 1, 8, 8),
                                 torch.zeros(known), mask)


def test_bad_numbers_in_a_completion_are_named():
    x, mask = torch.zeros(1, 1, 8, 8), torch.eye(8, dtype=torch.bool)
    with pytest.raises(ValueError, match="not finite"):
        list(NoiseScheduler().inpaint(lambda x, t: x / 0, x, x, mask, 3))


# The bound

def terms(scheduler, predict, x0, t):
    """Of one t, with all quantiles of the normal distribution in turn as noise."""
    order = torch.randperm(x0.numel(), generator=rng(t)).double()
    noise = torch.special.ndtri((order + 0.5) / x0.numel()).view(x0.shape)
    t = torch.full((len(x0),), t)
    noise_pred = predict(scheduler.add_noise(x0, noise, t), t)
    return scheduler.bound_terms(x0, noise, noise_pred, t)


@pytest.mark.parametrize("t", [1, 2, 30, 500, 999])
def test_a_term_is_the_divergence_of_two_normal_distributions(t):
    """Eq. 5's KL, from the means and the variance of Eq. 6, 7 and 11 by torch."""
    scheduler = NoiseScheduler()
    alpha_bar = alpha_bars(scheduler)
    a_t, a_s = alpha_bar[t + 1], alpha_bar[t]
    beta = 1 - a_t / a_s
    x0, noise, noise_pred = torch.randn(3, 4, 2, 8, 8, generator=rng()).double()
    xt = a_t**0.5 * x0 + (1 - a_t)**0.5 * noise
    sigma = math.sqrt((1 - a_s) / (1 - a_t) * beta)
    true_mean = (a_s**0.5 * beta * x0 + (a_t / a_s)**0.5 * (1 - a_s) * xt) / (1 - a_t)
    model_mean = (xt - beta / math.sqrt(1 - a_t) * noise_pred) / math.sqrt(a_t / a_s)
    nats = kl_divergence(Normal(true_mean, sigma), Normal(model_mean, sigma))
    expected = nats.sum(dim=(1, 2, 3)) / math.log(2) / (2 * 8 * 8)
    found = scheduler.bound_terms(x0, noise, noise_pred, torch.full((4,), t))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_the_prior_term_is_the_divergence_from_pure_noise():
    scheduler, x0 = NoiseScheduler(), torch.rand(3, 1, 8, 8, generator=rng()).double()
    a = alpha_bars(scheduler)[-1]
    nats = kl_divergence(Normal(a**0.5 * x0, math.sqrt(1 - a)),
                         Normal(torch.zeros(()).double(), 1.0))
    bits = nats.mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(scheduler.prior_term(x0), bits, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma", [1e-3, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-1.5, -1.0, -0.4, 0.003, 0.99, 2.0])
def test_the_last_step_is_a_distribution_over_256_levels(sigma, mean):
    log_p = discretised_gaussian(LEVELS, torch.full((256,), mean).double(), sigma)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_p.isfinite().all()
    single = discretised_gaussian(LEVELS.float(), torch.full((256,), mean), sigma)
    torch.testing.assert_close(single.double(), log_p, rtol=1e-3, atol=1e-3)


def test_far_from_its_mean_the_last_step_falls_as_a_normal_distribution_does():
    """Where the integral underflows: against the standard expansion of its tail."""
    log_p = discretised_gaussian(LEVELS[200], torch.tensor(-0.9).double(), 0.01).item()
    z = (LEVELS[200].item() - 1 / 255 + 0.9) / 0.01  # the near edge of the bin decides
    tail = -z**2 / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2)
    assert log_p == pytest.approx(tail, rel=1e-6) and log_p < -5000


def test_t_0_is_the_discretised_gaussian_around_the_implied_image():
    scheduler = NoiseScheduler()
    x0 = LEVELS[torch.randint(1, 255, (3, 1, 8, 8), generator=rng())]  # no edges
    noise, noise_pred = torch.randn(2, 3, 1, 8, 8, generator=rng(1)).double()
    t = torch.tensor([0, 5, 0])
    xt = scheduler.add_noise(x0, noise, t)
    mean = scheduler.sample_prev_timestep(xt, noise_pred, t)[[0, 2]]
    normal = Normal(mean, 0.01)  # beta_1 = 0.0001
    inner = normal.cdf(x0[[0, 2]] + 1 / 255) - normal.cdf(x0[[0, 2]] - 1 / 255)
    found = scheduler.bound_terms(x0, noise, noise_pred, t)
    torch.testing.assert_close(found[[0, 2]], -inner.log2().mean(dim=(1, 2, 3)),
                               rtol=1e-4, atol=1e-4)


def test_the_bound_of_gaussian_pixels_is_the_analytic_one():
    """The error that ε* leaves has the variance of ε given x_t, v ᾱ / (ᾱ v + 1 - ᾱ)."""
    scheduler, variance = NoiseScheduler(), 0.04
    alpha_bar = np.array(alpha_bars(scheduler)[1:])
    snr = alpha_bar / (1 - alpha_bar)
    of_noise = variance * alpha_bar / (alpha_bar * variance + 1 - alpha_bar)
    nats = ((snr[:-1] / snr[1:] - 1) / 2 * of_noise[1:]).sum()
    x0 = torch.randn(16, 1, 10, 10, generator=rng()).double()
    x0 = 0.3 + 0.2 * (x0 - x0.mean()) / x0.std()  # with exactly these moments
    predict = best_predictor(scheduler, 0.3, variance)
    found = sum(terms(scheduler, predict, x0, t).mean().item()
                for t in range(1, 1000))
    assert found == pytest.approx(nats / math.log(2), rel=0.005)


def geometric_scheduler(num_timesteps):
    """Steps that divide the signal-to-noise ratio by one factor each, 3e5 to 1e-3.

    The linear schedule can't become fine at its start: its first step always halves it.
    """
    alpha_bar = 1 / (1 + torch.logspace(-5.5, 3, num_timesteps, dtype=torch.float64))
    scheduler = NoiseScheduler(num_timesteps)
    scheduler._alpha_bar[1:] = alpha_bar
    scheduler._signal, scheduler._sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return scheduler


def test_the_bound_comes_down_to_the_entropy_as_steps_become_finer():
    """Pixels of 256 levels; ε* is that of their distribution, a sum over the levels."""
    log_p = Normal(-0.2, 0.3).log_prob(LEVELS).log_softmax(0)
    quantiles = (torch.arange(200).double() + 0.5) / 200
    levels = torch.searchsorted(log_p.exp().cumsum(0), quantiles)
    x0 = LEVELS[levels].view(2, 1, 10, 10)
    entropy = -log_p[levels].mean().item() / math.log(2)
    gaps = []
    for num_timesteps in (100, 400, 1600):
        scheduler = geometric_scheduler(num_timesteps)

        def predict(x, t):
            alpha_bar = scheduler._alpha_bar[int(t[0]) + 1]
            distance = x[..., None] - alpha_bar.sqrt() * LEVELS
            posterior = (log_p - distance**2 / (2 * (1 - alpha_bar))).softmax(-1)
            mean = posterior @ LEVELS
            return (x - alpha_bar.sqrt() * mean) / (1 - alpha_bar).sqrt()

        bound = scheduler.prior_term(x0) + sum(
            terms(scheduler, predict, x0, t) for t in range(num_timesteps))
        gaps.append(bound.mean().item() - entropy)
    assert 0 < gaps[2] < 0.06  # bits
    assert all(0.2 < after / before < 0.3 for before, after in pairwise(gaps))
