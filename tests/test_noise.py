import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from model import U_net
from noise import SAMPLERS, NoiseScheduler, autoguided, gaussian_noise, image_generators, image_labels


@pytest.fixture
def scheduler():
    return NoiseScheduler()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def as_paper(scheduler):
    """alpha and alpha_bar in float64 from the definition in section 2, one product at a time."""
    alpha = [1 - (1e-4 + (0.02 - 1e-4) * t / 999) for t in range(1000)]
    return alpha, [math.prod(alpha[:t + 1]) for t in range(1000)]


# The schedule

def test_schedule_is_the_papers(scheduler):
    alpha, alpha_bar = as_paper(scheduler)
    assert scheduler.alpha_bar[999].item() == pytest.approx(4.0358e-5, rel=1e-4)
    for buffer, expected in ((scheduler.alpha, alpha), (scheduler.alpha_bar, alpha_bar)):
        assert buffer.shape == (1000,) and buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.beta[[0, 999]], torch.tensor([1e-4, 0.02]))


@pytest.mark.parametrize("t, expected", [(0, 0), (487, 0.00979), (999, 0.02)])
def test_posterior_variance(scheduler, t, expected):
    # The step is linear in the fresh noise: with x_t = 0 and no predicted noise it is sigma times that noise.
    zero = torch.zeros(1, 1, 8, 8)
    sigma = scheduler.sample_prev_timestep(zero, zero, t, rng()) / gaussian_noise(zero, rng())
    torch.testing.assert_close(sigma**2, torch.full_like(sigma, expected), rtol=0, atol=1e-5)


def test_bad_schedule_is_refused():
    with pytest.raises(ValueError, match="num_timesteps 1"):
        NoiseScheduler(1)
    with pytest.raises(ValueError, match="beta_start 0.5, beta_end 0.1"):
        NoiseScheduler(beta_start=0.5, beta_end=0.1)


# The forward process

def test_closed_form_equals_the_composed_single_steps(scheduler):
    """Eq. 2 over and over: the coefficient of x_0 and the sum of the variances are those of Eq. 4."""
    alpha, _ = as_paper(scheduler)
    signal, noise_variance = 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for t in range(1000):
        signal, noise_variance = math.sqrt(alpha[t]) * signal, alpha[t] * noise_variance + 1 - alpha[t]
        at = torch.tensor([t])
        half_a_float32 = 2**-24  # the coefficients are the nearest float32, also where 1 - alpha_bar is small
        assert scheduler.add_noise(one, zero, at).item() == pytest.approx(signal, rel=half_a_float32)
        found = scheduler.add_noise(zero, one, at).item()
        assert found == pytest.approx(math.sqrt(noise_variance), rel=half_a_float32)


def test_every_image_gets_the_noise_of_its_own_timestep(scheduler):
    x0, noise = torch.randn(3, 2, 8, 9, generator=rng()), torch.randn(3, 2, 8, 9, generator=rng(1))
    together = scheduler.add_noise(x0, noise, torch.tensor([0, 500, 999]))
    alone = [scheduler.add_noise(x0[i:i + 1], noise[i:i + 1], torch.tensor([t])) for i, t in enumerate((0, 500, 999))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)
    assert together.dtype == torch.float32


@pytest.mark.parametrize("t", [-1, 1000])
def test_timestep_out_of_range_is_refused(scheduler, t):
    x = torch.zeros(1, 1, 8, 8)
    for at in (t, torch.tensor([t])):
        for call in (scheduler.add_noise, scheduler.sample_prev_timestep):
            with pytest.raises(ValueError, match=f"timestep {t}: must be in 0 ... 999"):
                call(x, x, at)


def test_one_timestep_for_several_images_is_refused(scheduler):
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"t of shape \(1,\): must be \(2,\)"):
        scheduler.add_noise(x, x, torch.tensor([3]))


# The reverse step

@pytest.fixture
def no_fresh_noise(monkeypatch):
    monkeypatch.setattr("noise.gaussian_noise", lambda like, generator=None: torch.zeros_like(like))


@pytest.mark.parametrize("t", [1, 10, 487, 998, 999])
@pytest.mark.parametrize("stride", [1, 20])
def test_mean_of_eq_11_is_the_bayes_posterior_of_eq_7(scheduler, no_fresh_noise, t, stride):
    """Also where steps are left out: those between t and s are one step, which keeps alpha_bar_t / alpha_bar_s."""
    _, alpha_bar = as_paper(scheduler)
    s = max(t - stride, 0)
    alpha = alpha_bar[t] / alpha_bar[s]
    x0, noise = torch.randn(4, 1, 8, 8, generator=rng()).double(), torch.randn(4, 1, 8, 8, generator=rng(1)).double()
    xt = math.sqrt(alpha_bar[t]) * x0 + math.sqrt(1 - alpha_bar[t]) * noise
    expected = (math.sqrt(alpha_bar[s]) * (1 - alpha) / (1 - alpha_bar[t]) * x0
                + math.sqrt(alpha) * (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * xt)
    steps = [scheduler.ddpm_step(xt, noise, t, s), scheduler.ddpm_step(xt, noise, torch.full((4,), t), torch.full((4,), s))]
    if stride == 1:
        steps += [scheduler.sample_prev_timestep(xt, noise, t), scheduler.sample_prev_timestep(xt, noise, torch.full((4,), t))]
    for step in steps:
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-12)


def test_posterior_agrees_with_gaussians_multiplied_on_a_grid(scheduler, no_fresh_noise):
    """Bayes' rule by brute force: q(x_{t-1} given x_0) times q(x_t given x_{t-1}), normalised on a fine grid."""
    t, x0, xt = 300, 0.4, -0.3
    alpha, alpha_bar = as_paper(scheduler)
    grid = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    log_density = (-(grid - math.sqrt(alpha_bar[t - 1]) * x0)**2 / (2 * (1 - alpha_bar[t - 1]))
                   - (xt - math.sqrt(alpha[t]) * grid)**2 / (2 * (1 - alpha[t])))
    weight = torch.softmax(log_density, 0)
    noise = (xt - math.sqrt(alpha_bar[t]) * x0) / math.sqrt(1 - alpha_bar[t])
    step = scheduler.sample_prev_timestep(*torch.tensor([xt, noise], dtype=torch.float64).view(2, 1, 1, 1, 1), t)
    assert step.item() == pytest.approx((weight * grid).sum().item(), abs=1e-9)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_more_fresh_noise_than_the_ancestral_steps_is_refused(scheduler, eta):
    xt = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=f"eta {eta}: must be in 0 ... 1"):
        scheduler.ddim_step(xt, xt, 10, 5, eta=eta)


def test_a_step_between_timesteps_far_apart_has_no_complex_coefficient():
    """1 - ᾱ_s - σ² is about zero where hardly anything of the image is left, and rounds to less."""
    scheduler, xt = NoiseScheduler(1000, 1e-4, 0.1), torch.ones(2, 1, 2, 2)
    for t, s in ((757, 3), (torch.tensor([757, 757]), torch.tensor([3, 3]))):
        xs = scheduler.ddim_step(xt, xt, t, s, eta=1.0, generator=rng(0))
        assert xs.dtype == torch.float32 and xs.isfinite().all()


def test_the_timesteps_of_a_step_may_be_of_two_kinds(scheduler):
    xt, noise_pred = torch.randn(2, 2, 1, 8, 8)
    mixed = scheduler.ddpm_step(xt, noise_pred, 500, torch.tensor([100, 200]), rng(0))
    alike = scheduler.ddpm_step(xt, noise_pred, torch.tensor([500, 500]), torch.tensor([100, 200]), rng(0))
    torch.testing.assert_close(mixed, alike)


def test_ddim_with_eta_1_over_all_steps_is_the_ancestral_step(scheduler):
    xt, noise_pred = torch.randn(2, 1, 8, 8, generator=rng()).double(), torch.randn(2, 1, 8, 8, generator=rng(1)).double()
    for t in range(1000):
        ddim = scheduler.ddim_step(xt, noise_pred, t, t - 1, eta=1.0, generator=rng(t))
        torch.testing.assert_close(ddim, scheduler.sample_prev_timestep(xt, noise_pred, t, rng(t)), rtol=0, atol=1e-12)


def independent_dummy(x, t):
    return x * t / (t + 1)


def independent_sample():
    return (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def test_ddim_equals_the_published_result_of_another_implementation(scheduler):
    """The constants of the tests of diffusers (DDIMScheduler, ten steps from t = 900, eta 0) for their dummy model."""
    xt = independent_sample()
    times = [*range(900, -1, -100), -1]
    for t, s in zip(times, times[1:]):
        xt = scheduler.ddim_step(xt, independent_dummy(xt, t), t, s)
    assert xt.abs().sum().item() == pytest.approx(172.0067, abs=1e-2)
    assert xt.abs().mean().item() == pytest.approx(0.223967, abs=1e-3)


def test_the_ancestral_walk_equals_the_published_result_of_another_implementation(scheduler):
    """The constants of the tests of diffusers (DDPMScheduler, all steps), which clip the x_0 that each prediction implies."""
    xt, generator, (_, alpha_bar) = independent_sample(), rng(), as_paper(scheduler)
    for t in range(999, -1, -1):
        signal, noise = math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t])
        x0 = ((xt - noise * independent_dummy(xt, t)) / signal).clamp(-1, 1)
        xt = scheduler.sample_prev_timestep(xt, (xt - signal * x0) / noise, t, generator)
    assert xt.abs().sum().item() == pytest.approx(258.9606, abs=1e-2)
    assert xt.abs().mean().item() == pytest.approx(0.3372, abs=1e-3)


def mixture_of_two(alpha_bar):
    """Weights, means and variances at one alpha_bar of data that are 0.3 N(-0.6, 0.2^2) + 0.7 N(0.5, 0.3^2)."""
    mean = math.sqrt(alpha_bar) * torch.tensor([-0.6, 0.5]).double()
    return torch.tensor([0.3, 0.7]).double(), mean, alpha_bar * torch.tensor([0.2, 0.3]).double()**2 + 1 - alpha_bar


def exact_noise_of_the_mixture(x, alpha_bar):
    """-sqrt(1 - alpha_bar) times the derivative of the log density of x_t."""
    weight, mean, variance = mixture_of_two(alpha_bar)
    away = x[..., None] - mean
    share = torch.softmax(weight.log() - variance.log() / 2 - away**2 / variance / 2, dim=-1)
    return math.sqrt(1 - alpha_bar) * (share * away / variance).sum(-1)


def quantile_of_the_mixture(x, alpha_bar):
    weight, mean, variance = mixture_of_two(alpha_bar)
    return (weight * torch.special.ndtr((x[..., None] - mean) / variance.sqrt())).sum(-1)


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpm_solver", 2)])
def test_the_error_of_a_solver_falls_with_its_order(solver, order):
    """In one dimension the exact deterministic path is known: it keeps the quantile of x_t in the distribution at t."""
    scheduler = NoiseScheduler(100_000, 1e-6, 2e-4)
    alpha_bar = (1 - torch.linspace(1e-6, 2e-4, 100_000).double()).cumprod(0)
    half_log_snr = (alpha_bar / (1 - alpha_bar)).log() / 2
    first, last = 95_000, 1_000
    start = torch.linspace(-2, 2, 21).double().view(-1, 1, 1, 1)

    def error(num_steps):
        even = torch.linspace(half_log_snr[first], half_log_snr[last], num_steps + 1)
        times = [(half_log_snr - value).abs().argmin().item() for value in even]
        step = scheduler.ddim_step if solver == "ddim" else scheduler.dpm_solver(eta=0)
        xt = start
        for t, s in zip(times, times[1:]):
            xt = step(xt, exact_noise_of_the_mixture(xt, alpha_bar[t].item()), t, s)
        kept = quantile_of_the_mixture(start, alpha_bar[first].item())
        return (quantile_of_the_mixture(xt, alpha_bar[last].item()) - kept).abs().max().item()

    coarse, fine = error(40), error(160)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_solver_is_exact_where_the_predicted_image_moves_evenly(scheduler, no_fresh_noise, eta):
    """x_t = α z with dz = (1 + eta^2) (x̂_0 - z) dλ in the mean, integrated in small steps of Runge and Kutta."""
    _, alpha_bar = as_paper(scheduler)
    half_log_snr = [math.log(a / (1 - a)) / 2 for a in alpha_bar]
    moving = lambda at: 0.3 - 0.2 * at  # x̂_0 as a function of λ

    def noise(x, t):
        return (x - math.sqrt(alpha_bar[t]) * moving(half_log_snr[t])) / math.sqrt(1 - alpha_bar[t])
    step, x = scheduler.dpm_solver(eta), torch.full((1, 1, 1, 1), 0.7).double()
    x = step(x, noise(x, 700), 700, 500)
    z, at, h = x.item() / math.sqrt(alpha_bar[500]), half_log_snr[500], (half_log_snr[200] - half_log_snr[500]) / 1000
    slope = lambda z, at: (1 + eta**2) * (moving(at) - z)
    for _ in range(1000):
        k1 = slope(z, at)
        k2 = slope(z + h / 2 * k1, at + h / 2)
        k3 = slope(z + h / 2 * k2, at + h / 2)
        k4 = slope(z + h * k3, at + h)
        z, at = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), at + h
    assert step(x, noise(x, 500), 500, 200).item() == pytest.approx(math.sqrt(alpha_bar[200]) * z, abs=1e-9)


def test_the_first_and_the_last_step_of_the_solver_are_ancestral(scheduler):
    """With no step before it, or no signal-to-noise ratio after it, D is the predicted x_0."""
    x, first, last = torch.randn(3, 2, 1, 8, 8, generator=rng()).double()
    step = scheduler.dpm_solver()
    torch.testing.assert_close(step(x, first, 999, 500, rng(1)), scheduler.ddpm_step(x, first, 999, 500, rng(1)))
    torch.testing.assert_close(step(x, last, 500, -1, rng(2)), scheduler.ddpm_step(x, last, 500, -1, rng(2)))


def test_the_true_noise_at_t_0_recovers_x0(scheduler):
    x0, noise = torch.rand(2, 3, 8, 8, generator=rng()) * 2 - 1, torch.randn(2, 3, 8, 8, generator=rng(1))
    xt = scheduler.add_noise(x0, noise, torch.zeros(2, dtype=torch.long))
    for at in (0, torch.zeros(2, dtype=torch.long)):
        torch.testing.assert_close(scheduler.sample_prev_timestep(xt, noise, at), x0, rtol=0, atol=1e-6)


# The whole loop

def gaussian_denoiser(scheduler, mean, std):
    """E[noise given x_t] where the data are N(mean, std^2): linear regression of two joint Gaussians."""
    _, alpha_bar = as_paper(scheduler)

    def model(x, t):
        a = alpha_bar[t[0]]
        return math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (a * std**2 + 1 - a)
    return model


@pytest.mark.parametrize("sampler, num_steps", [("ddpm", 1000), ("ddpm", 200), ("ddim", 1000), ("ddim", 200),
                                                ("dpm_solver", 1000), ("dpm_solver", 100)])
def test_samples_of_a_gaussian_have_its_mean_and_variance(scheduler, sampler, num_steps):
    mean, std, n = 0.3, 0.5, 40_000
    xt = torch.randn(n, 1, 1, 1, generator=rng()).double()
    *_, (t, x0) = scheduler.denoise(gaussian_denoiser(scheduler, mean, std), xt, num_steps, sampler, rng(1))
    assert t == -1
    bias = 0.02 * std  # of the finite number of steps
    assert abs(x0.mean().item() - mean) < 4 * std / math.sqrt(n) + bias
    assert abs(x0.std().item() - std) < 4 * std / math.sqrt(2 * n) + bias


@pytest.mark.parametrize("t", [0, 300, 999])
@pytest.mark.parametrize("guidance", [1.0, 1.5, 3.0])
def test_guided_noise_of_two_gaussians_is_that_of_their_weighted_product(scheduler, t, guidance):
    """The scores add up, so x_t looks drawn from p_model^w p_guide^(1 - w): a Gaussian again, whose precisions add up."""
    (mean, std), (guide_mean, guide_std) = (0.3, 0.5), (0.1, 0.8)
    alpha_bar = as_paper(scheduler)[1][t]
    w, v, u = guidance, *(alpha_bar * s**2 + 1 - alpha_bar for s in (std, guide_std))  # the variances of x_t
    precision = w / v + (1 - w) / u
    center = math.sqrt(alpha_bar) * (w / v * mean + (1 - w) / u * guide_mean) / precision
    predict = autoguided(gaussian_denoiser(scheduler, mean, std), gaussian_denoiser(scheduler, guide_mean, guide_std), guidance)
    x = torch.randn(100, 1, 1, 1, generator=rng()).double()
    expected = math.sqrt(1 - alpha_bar) * (x - center) * precision  # noise = -sqrt(1 - alpha_bar) score
    assert torch.allclose(predict(x, torch.full((100,), t)), expected, rtol=0, atol=1e-12)


def test_guidance_between_predictions_in_bf16_is_computed_in_the_images_precision():
    """bf16 has steps of 1/128 above 1; half a step further is no bf16 number."""
    model, guide = (lambda x, t, value=value: torch.full_like(x, value, dtype=torch.bfloat16) for value in (1 + 1 / 128, 1.0))
    noise_pred = autoguided(model, guide, 1.5)(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    assert noise_pred.dtype == torch.float32 and (noise_pred == 1 + 1.5 / 128).all()


def test_guidance_below_1_is_refused():
    with pytest.raises(ValueError, match="guidance 0.5: must be at least 1"):
        autoguided(lambda x, t: x, lambda x, t: x, 0.5)


def test_ddim_equals_the_closed_form_on_a_gaussian(scheduler):
    """Every deterministic step scales x - sqrt(alpha_bar) mean; the product of the scales is known beforehand."""
    mean, std = 0.3, 0.5
    _, alpha_bar = as_paper(scheduler)
    alpha_bar.append(1.0)  # reached as alpha_bar[-1]
    xt = torch.randn(5, 1, 8, 8, generator=rng()).double()
    expected = xt - math.sqrt(alpha_bar[999]) * mean
    times = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    for t, s in zip(times, times[1:]):
        a, b = alpha_bar[t], alpha_bar[s]
        slope = math.sqrt(1 - a) / (a * std**2 + 1 - a)
        expected = expected * (math.sqrt(b / a) * (1 - math.sqrt(1 - a) * slope) + math.sqrt(1 - b) * slope)
    *_, (_, x0) = scheduler.denoise(gaussian_denoiser(scheduler, mean, std), xt, 10, "ddim")
    torch.testing.assert_close(x0, expected + mean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampler, num_steps, eta", [("ddpm", None, None), ("ddpm", 33, None), ("ddim", None, 0), ("ddim", 10, 0),
                                                     ("ddim", 10, 1.0), ("ddim", 1, 0),
                                                     ("dpm_solver", None, 1.0), ("dpm_solver", 10, 0)])
def test_a_perfect_denoiser_of_one_image_returns_it(scheduler, sampler, num_steps, eta):
    _, alpha_bar = as_paper(scheduler)
    image = torch.rand(1, 3, 9, 8, generator=rng()) * 2 - 1

    def model(x, t):
        a = alpha_bar[t[0]]
        return (x - math.sqrt(a) * image) / math.sqrt(1 - a)
    xt = torch.randn(4, 3, 9, 8, generator=rng(1))
    *_, (t, x0) = scheduler.denoise(model, xt, num_steps, sampler, rng(2), eta=eta)
    assert t == -1
    torch.testing.assert_close(x0, image.expand(4, -1, -1, -1), rtol=0, atol=5e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_the_last_prediction_is_the_image_and_another_network_may_make_it(scheduler, sampler, num_steps):
    """Two perfect denoisers, each of an image of its own: one for the way, one for the end."""
    _, alpha_bar = as_paper(scheduler)
    way, end = torch.rand(2, 1, 1, 8, 8, generator=rng()) * 2 - 1
    seen = []

    def denoiser(image):
        def model(x, t):
            seen.append((image is end, t[0].item()))
            return (x - math.sqrt(alpha_bar[t[0]]) * image) / math.sqrt(1 - alpha_bar[t[0]])
        return model
    xt = torch.randn(2, 1, 8, 8, generator=rng(1))
    *_, (_, x0) = scheduler.denoise(denoiser(way), xt, num_steps, sampler, rng(2), last=denoiser(end))
    assert seen == [(t == scheduler.timesteps(num_steps)[-2], t) for t in scheduler.timesteps(num_steps)[:-1]]
    torch.testing.assert_close(x0, end.expand(2, -1, -1, -1), rtol=0, atol=5e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 7, 10, 33, 1000])
def test_timesteps_fall_strictly_from_the_last_to_the_clean_image(scheduler, sampler, num_steps):
    seen = []

    def model(x, t):
        seen.append(t.tolist())
        return x
    yielded = [t for t, _ in scheduler.denoise(model, torch.zeros(2, 1, 8, 8), num_steps, sampler, rng())]
    assert seen[0] == [999, 999] and len(seen) == num_steps
    times = [t for t, _ in seen]
    assert times + [-1] == [999] + yielded and all(t > s for t, s in zip(times, yielded))


def draw_images(images, sampler, eta=None, device="cpu"):
    """Images of seed 3 in ten steps by a network that mixes no two images."""
    scheduler, generators = NoiseScheduler(device=device), image_generators(3, images, device)
    xt = gaussian_noise(torch.empty(len(images), 1, 8, 8, device=device), generators)
    *_, (_, x0) = scheduler.denoise(lambda x, t: x.tanh(), xt, 10, sampler, generators, eta=eta)
    return x0


@pytest.mark.parametrize("sampler, eta", [("ddpm", None), ("ddim", 0), ("ddim", 1.0), ("dpm_solver", None)])
@pytest.mark.parametrize("images", [range(5, 6), range(60, 70), range(64, 128), range(3, 150)])
def test_an_image_is_the_same_in_a_batch_of_any_size(sampler, eta, images):
    many = draw_images(range(150), sampler, eta)
    alone = draw_images(images, sampler, eta)
    torch.testing.assert_close(alone, many[images.start:images.stop], rtol=0, atol=1e-6)
    assert len(many.unique(dim=0)) == 150  # and no two are the same


def test_on_a_gpu_too_an_image_is_the_same_in_a_batch_of_any_size(cuda):
    many = draw_images(range(150), "dpm_solver", device=cuda)
    torch.testing.assert_close(draw_images(range(60, 70), "dpm_solver", device=cuda), many[60:70],
                               rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_recorded_walk_is_the_plain_one(cuda, monkeypatch, sampler, bf16):
    torch.manual_seed(0)
    model = U_net(cuda, t_dim=8, widths=(8, 16)).eval()

    def draw():
        generators = image_generators(0, range(3), cuda)
        xt = gaussian_noise(torch.empty(3, 1, 16, 16, device=cuda), generators)
        with torch.autocast(cuda, torch.bfloat16, enabled=bf16):
            *_, (_, x0) = NoiseScheduler(device=cuda).denoise(model, xt, 12, sampler, generators)
        return x0
    recorded = draw()
    monkeypatch.setattr("noise.recorded", lambda model, plain_calls: model)
    assert torch.equal(draw(), recorded) and recorded.isfinite().all()


def test_the_noise_of_images_is_standard_normal_and_each_has_its_own():
    """Kolmogorov's distance to the normal distribution, and no correlation between two images or two draws."""
    generators = image_generators(0, range(30, 130))
    draws = torch.stack([gaussian_noise(torch.empty(100, 1, 16, 16), generators) for _ in range(2)])
    values = draws.double().flatten().sort().values
    expected = torch.special.ndtr(values)
    steps = torch.arange(len(values)) / len(values)
    assert (expected - steps).abs().max() < 1.95 / len(values)**0.5  # by chance once in a thousand
    rows = draws.double().flatten(2).flatten(0, 1)
    correlation = torch.corrcoef(rows) - torch.eye(200)
    assert correlation.abs().max() < 6 / 256**0.5


@pytest.mark.parametrize("images", [range(0), range(-1, 3), range(0, 10, 2)])
def test_numbers_of_images_that_are_none_are_refused(images):
    with pytest.raises(ValueError, match="must be a range of consecutive numbers from 0"):
        image_generators(0, images)


@pytest.mark.parametrize("arguments, message", [
    ({"sampler": "euler"}, "sampler 'euler': choose from ddpm, ddim, dpm_solver"),
    ({"num_steps": 0}, "num_steps 0: must be in 1 ... 1000"),
    ({"num_steps": 1001}, "num_steps 1001: must be in 1 ... 1000"),
    ({"sampler": "ddim", "eta": 1.5}, "eta 1.5: must be in 0 ... 1"),
    ({"sampler": "ddpm", "eta": 0.5}, "eta 0.5: .* 1 or None with sampler 'ddpm'"),
])
def test_bad_arguments_are_refused_at_the_call(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler.denoise(lambda x, t: x, torch.zeros(1, 1, 8, 8), **arguments)


def test_a_prediction_that_is_not_finite_is_refused(scheduler):
    with pytest.raises(ValueError, match="not finite"):
        list(scheduler.denoise(lambda x, t: x * float("nan"), torch.zeros(1, 1, 8, 8), 5))


def test_the_streams_of_other_images_are_refused():
    with pytest.raises(ValueError, match="streams of 1 images for 2"):
        gaussian_noise(torch.empty(2, 1, 8, 8), image_generators(0, range(1)))


def test_the_implied_image_is_the_one_that_the_true_noise_was_added_to(scheduler):
    x0, noise = torch.rand(3, 2, 8, 8, generator=rng()) * 2 - 1, torch.randn(3, 2, 8, 8, generator=rng(1))
    t = torch.tensor([0, 400, 700])
    xt = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(scheduler.implied_x0(xt, noise, t), x0, rtol=0, atol=1e-5)
    for i, at in enumerate(t.tolist()):
        alone = scheduler.implied_x0(xt[i:i + 1], noise[i:i + 1], at)
        torch.testing.assert_close(alone, x0[i:i + 1], rtol=0, atol=1e-5)


def test_denoise_is_the_loop_of_its_steps_at_their_default_noise(scheduler):
    start = torch.randn(2, 1, 8, 8, generator=rng())
    for name, step in (("ddpm", scheduler.ddpm_step), ("ddim", partial(scheduler.ddim_step, eta=0.0)),
                       ("dpm_solver", scheduler.dpm_solver(eta=1.0))):
        xt, generator = start, rng(1)
        for t, s in pairwise(scheduler.timesteps(10)):
            xt = step(xt, xt.tanh(), t, s, generator=generator)
        *_, (_, x0) = scheduler.denoise(lambda x, t: x.tanh(), start, 10, name, rng(1))
        assert torch.equal(x0, xt)


@pytest.mark.parametrize("spacing", [0.5, 1.0, 1.5, 3.0])
def test_timesteps_follow_their_power_and_none_comes_twice(scheduler, spacing):
    for num_steps in (1, 4, 10):
        found = scheduler.timesteps(num_steps, spacing)
        exact = [1000 * (1 - i / num_steps)**spacing - 1 for i in range(num_steps + 1)]
        assert found == pytest.approx(exact, abs=0.5 + 1e-9)
    for num_steps in (333, 999, 1000):
        found = scheduler.timesteps(num_steps, spacing)
        assert (found[0], found[-1], len(found)) == (999, -1, num_steps + 1)
        assert all(t > s for t, s in zip(found, found[1:]))
    assert scheduler.timesteps(None, spacing) == list(range(999, -2, -1))


def test_bad_spacing_is_refused(scheduler):
    with pytest.raises(ValueError, match="spacing 0: must be above 0"):
        scheduler.timesteps(10, 0)


# Labels

CLASSES = ["cat", "dog", "fish"]


def test_a_label_is_a_name_or_a_number_and_a_list_is_taken_in_turn():
    def of(label, classes=CLASSES):
        return image_labels(label, 0, range(4), classes, [1] * len(classes)).tolist()
    assert of("dog") == of(1) == [1] * 4
    assert of(["fish", 0]) == [2, 0, 2, 0]
    assert of("1") == [1] * 4  # as typed
    assert of(7, ["3", "7"]) == of("7", ["3", "7"]) == [1] * 4  # digits by what they show
    assert of(["07", 7], ["07", "7", "8"]) == [0, 1, 0, 1] and of(7, ["07", "8"]) == [0] * 4
    for number in (0, 1):  # no class of this name, so not the first or second one
        with pytest.raises(ValueError, match=f"label {number}: choose from 5, 6"):
            of(number, ["5", "6"])
    with pytest.raises(ValueError, match="label 'cow': choose from cat, dog, fish"):
        of(["cat", "cow"])
    with pytest.raises(ValueError, match="label 3: choose from cat, dog, fish"):
        of(3)
    with pytest.raises(ValueError, match="label 7: this network was trained without labels"):
        image_labels(7, 0, range(4), [], [])


def test_without_a_label_each_image_draws_its_own_as_frequent_as_in_the_data():
    labels = image_labels(None, 0, range(4000), CLASSES, [1, 0, 3])
    share = (labels == 2).double().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000)**0.5 and not (labels == 1).any()
    assert torch.equal(image_labels(None, 0, range(10, 20), CLASSES, [1, 0, 3]), labels[10:20])
    assert image_labels(None, 0, range(3), [], []) is None
    alike = image_labels(None, 0, range(3000), CLASSES, [])  # of a checkpoint that does not say
    assert (alike.bincount(minlength=3) - 1000).abs().max() < 4 * 26  # binomial: sigma is 26
