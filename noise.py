"""The diffusion process: the forward process, one reverse step a sampler, and the loop that both notebooks show.

The timestep t = 0 ... T-1 in code is the paper's t = 1 ... T, and t = -1 is the clean image: alpha_bar there is 1,
so that the last step is like every other and needs no branch.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

Generators = torch.Generator | list[torch.Generator] | None
Predictor = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> predicted noise: a network
SAMPLERS = ("ddpm", "ddim", "dpm_solver")


def random_stream(*numbers: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A random stream for a row of numbers in 0 ... 2^32 - 1, such as (seed, image): another for every row of that length."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state))


def image_generators(seed: int, images: range) -> list[torch.Generator]:
    """One random stream for each image of `seed`, so that image i is the same picture in a batch of any size."""
    return [random_stream(seed, i) for i in images]


def gaussian_noise(like: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise of the shape, type and device of `like` (B, ...).

    generator: None for the global stream, one generator for the whole batch, or a list with one for each image.
    Raises ValueError where the list is not as long as the batch.
    """
    def draw(shape, generator):
        device = like.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=device)

    if not isinstance(generator, list):
        return draw(like.shape, generator).to(like.device)
    if len(generator) != len(like):
        raise ValueError(f"{len(generator)} generators for {len(like)} images: pass one for each image")
    return torch.stack([draw(like.shape[1:], g) for g in generator]).to(like.device)


def autoguided(model: Predictor, guide: Predictor, guidance: float) -> Predictor:
    """Autoguidance (Karras et al. 2024, section 4): a prediction that goes on past `model`, away from a weaker network.

        ε = ε_guide + w (ε_model - ε_guide)

    guide: a network of the same images and noise schedule that errs where `model` errs, only more, as when it has the same
    parts and was trained for a sixteenth of the time. Where both agree nothing changes; where they differ, what the longer
    training mended is mended further.
    guidance: w. 1 is `model` alone; larger values draw clearer and, in the end, less varied images. Raises ValueError below 1.
    """
    if not guidance >= 1:
        raise ValueError(f"guidance {guidance}: must be at least 1, which draws without the guide")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        weaker = guide(x, t).to(x.dtype)  # the difference of two predictions in bf16 has few digits left
        return weaker + guidance * (model(x, t) - weaker)
    return predict


class NoiseScheduler(nn.Module):
    """The linear noise schedule of Ho et al. 2020, section 4, and the steps forward and back along it.

    num_timesteps: T, from 2. beta_start, beta_end: variance added by the first and the last step, in (0, 1).
    Buffers `beta`, `alpha` = 1 - beta and `alpha_bar`, the running product of alpha: (T,), computed in float64, kept in
    float32. The steps take their coefficients from a float64 copy: in float32, 1 - alpha_bar loses four digits at t = 0.
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
                 device: str | torch.device = "cpu"):
        super().__init__()
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps {num_timesteps}: must be at least 2")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start {beta_start}, beta_end {beta_end}: must be 0 < beta_start <= beta_end < 1")
        self.num_timesteps = num_timesteps
        beta = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        self.register_buffer("beta", beta.float())
        self.register_buffer("alpha", (1 - beta).float())
        self.register_buffer("alpha_bar", alpha_bar.float())
        alpha_bar = torch.cat([torch.ones(1).double(), alpha_bar])  # from t = -1
        self.register_buffer("_alpha_bar", alpha_bar, persistent=False)
        self._alpha_bar_float = alpha_bar.tolist()
        self.to(device)

    def _alpha_bar_at(self, t: int | Tensor, like: Tensor, first: int = 0) -> float | Tensor:
        """alpha_bar_t in float64 to multiply `like` by: a number for an int t, of shape (B, 1, 1, 1) for t (B,).

        Raises ValueError where t is not in first ... T-1; a t on a GPU is not looked at, which would halt the queue of work.
        """
        if not isinstance(t, Tensor):
            self._check_range(t, t, first)
            return self._alpha_bar_float[t + 1]
        if t.shape != like.shape[:1]:
            raise ValueError(f"t of shape {tuple(t.shape)}: must be ({len(like)},), one timestep for each image")
        if t.device.type == "cpu" and len(t):
            self._check_range(*t.aminmax(), first)
        return self._alpha_bar[t + 1].view(-1, *[1] * (like.ndim - 1))

    def _alpha_bars(self, t: int | Tensor, s: int | Tensor, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        if not isinstance(t, Tensor) and s >= t:
            raise ValueError(f"a step from timestep {t} to {s}: must go to an earlier one")
        return self._alpha_bar_at(t, like), self._alpha_bar_at(s, like, first=-1)

    def _check_range(self, low: int, high: int, first: int) -> None:
        if low < first or high >= self.num_timesteps:
            wrong = int(low if low < first else high)
            raise ValueError(f"timestep {wrong}: must be in {first} ... {self.num_timesteps - 1}")

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Forward process in closed form (Eq. 4): x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.

        x0, noise (B, C, H, W), x0 in [-1, 1], noise standard normal; t (B,) int64 -> x_t (B, C, H, W).
        """
        alpha_bar = self._alpha_bar_at(t, x0)
        return (alpha_bar**0.5).to(x0.dtype) * x0 + ((1 - alpha_bar)**0.5).to(x0.dtype) * noise

    def sample_prev_timestep(self, xt: Tensor, noise_pred: Tensor, t: int | Tensor,
                             generator: Generators = None) -> Tensor:
        """One ancestral step: x_{t-1} drawn from p(x_{t-1} given x_t), with Eq. 11's mean and Eq. 7's variance.

        xt, noise_pred (B, C, H, W); t an int or (B,) int64 -> x_{t-1}. At t = 0 the variance is 0: no noise is added.
        """
        return self.ddpm_step(xt, noise_pred, t, t - 1, generator)

    def ddpm_step(self, xt: Tensor, noise_pred: Tensor, t: int | Tensor, s: int | Tensor,
                  generator: Generators = None) -> Tensor:
        """Ancestral step from t to any earlier s: the steps between are taken as one, of α = ᾱ_t / ᾱ_s and β = 1 - α.

        Eq. 11: mean = (x_t - β / √(1 - ᾱ_t) ε_θ) / √α; Eq. 7: variance = (1 - ᾱ_s) / (1 - ᾱ_t) β.
        Leaving steps out this way is from Nichol and Dhariwal 2021, section 4.
        xt, noise_pred (B, C, H, W); t and s ints or (B,) int64, s from -1 -> x_s (B, C, H, W).
        Raises ValueError for a timestep out of range (in a tensor on a GPU it is not looked for), and where ints s >= t.
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bars(t, s, xt)
        alpha = alpha_bar_t / alpha_bar_s
        beta = 1 - alpha
        mean = (xt - beta / (1 - alpha_bar_t)**0.5 * noise_pred) / alpha**0.5
        sigma = ((1 - alpha_bar_s) / (1 - alpha_bar_t) * beta)**0.5
        return (mean + sigma * gaussian_noise(xt, generator)).to(xt.dtype)

    def ddim_step(self, xt: Tensor, noise_pred: Tensor, t: int | Tensor, s: int | Tensor, eta: float = 0.0,
                  generator: Generators = None) -> Tensor:
        """Step from t to any earlier s of Song et al. 2021 (DDIM), Eq. 12; eta scales the fresh noise of Eq. 16.

        eta = 0 adds none, and x_0 is then a function of the first x_t; eta = 1 is the ancestral step.
        Shapes and errors as in `ddpm_step`; ValueError as well where eta is not in [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: must be in 0 ... 1")
        alpha_bar_t, alpha_bar_s = self._alpha_bars(t, s, xt)
        x0 = (xt - (1 - alpha_bar_t)**0.5 * noise_pred) / alpha_bar_t**0.5
        sigma = eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))**0.5
        xs = alpha_bar_s**0.5 * x0 + (1 - alpha_bar_s - sigma**2)**0.5 * noise_pred
        if eta > 0:
            xs = xs + sigma * gaussian_noise(xt, generator)
        return xs.to(xt.dtype)

    def dpm_solver(self, eta: float = 1.0) -> Callable[..., Tensor]:
        """A second-order multistep solver, DPM-Solver++(2M) of Lu et al. 2022: of the ODE with eta = 0, of the SDE with eta = 1.

        Half the log of the signal-to-noise ratio, λ = log √(ᾱ / (1 - ᾱ)), is the clock. On the way from t to s, h = λ_s - λ_t,
        the exact solution (Eq. 8; section 5 for the SDE) sees the predicted image x̂_0 at each λ with the weight e^{kλ}, where
        k = 1 + eta². It is taken to go on in a straight line as it moved on the step before, from u to t:

            D = x̂_0(t) + (h / (1 - e^{-kh}) - 1 / k) (x̂_0(t) - x̂_0(u)) / (λ_t - λ_u)

        is its mean, and what follows is the step of DDIM by the noise that D leaves in x_t. (With h / 2 in the first bracket,
        close to it where h is small, this is the paper's Algorithm 2.) The first step has nothing to look back on, and the
        last, where λ_s is infinite, takes x̂_0 as it is. Between eta = 0 and 1 the fresh noise is DDIM's, which is not quite
        that of the SDE.

        Returns step(xt, noise_pred, t, s, generator=None) -> x_s, t and s int. It remembers: take a new one for every walk.
        """
        u, x0_u = None, None

        def step(xt: Tensor, noise_pred: Tensor, t: int, s: int, generator: Generators = None) -> Tensor:
            nonlocal u, x0_u
            alpha_bar = self._alpha_bar_at(t, xt)
            x0 = (xt - (1 - alpha_bar)**0.5 * noise_pred) / alpha_bar**0.5
            if u is not None and s >= 0:
                lambda_u, lambda_t, lambda_s = map(self._half_log_snr, (u, t, s))
                h, k = lambda_s - lambda_t, 1 + eta**2
                correction = (h / -math.expm1(-k * h) - 1 / k) / (lambda_t - lambda_u) * (x0 - x0_u)  # D - x0
                noise_pred = noise_pred - (alpha_bar / (1 - alpha_bar))**0.5 * correction
            u, x0_u = t, x0
            return self.ddim_step(xt, noise_pred, t, s, eta, generator)
        return step

    def _half_log_snr(self, t: int) -> float:
        alpha_bar = self._alpha_bar_float[t + 1]
        return math.log(alpha_bar / (1 - alpha_bar)) / 2

    def denoise(self, model: Predictor, xt: Tensor, num_steps: int | None = None, sampler: str = "ddpm",
                generator: Generators = None, eta: float | None = None) -> Iterator[tuple[int, Tensor]]:
        """The reverse process from pure noise to images, one evaluation of the network a step.

        model(x, t): predicts the noise; xt (B, C, H, W): standard normal, the x_t of t = T-1.
        num_steps: 1 ... T (None: all T). sampler: "ddpm" (ancestral), "ddim" or "dpm_solver".
        eta: how much of the ancestral step's fresh noise "ddim" (None: 0) and "dpm_solver" (None: 1) add, in [0, 1].
        Yields (t, x_t) after each step, t strictly decreasing, at last (-1, x_0): images in about [-1, 1].
        Raises ValueError for a value that is none of these, and where the network predicts a number that is not finite.
        """
        num_steps = self.num_timesteps if num_steps is None else num_steps
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"num_steps {num_steps}: must be in 1 ... {self.num_timesteps}")
        eta = float(sampler != "ddim") if eta is None else eta
        if not 0 <= eta <= 1 or (sampler == "ddpm" and eta != 1):
            raise ValueError(f"eta {eta}: must be in 0 ... 1, and 1 or None with sampler 'ddpm'")
        step = {"ddpm": self.ddpm_step, "ddim": partial(self.ddim_step, eta=eta), "dpm_solver": self.dpm_solver(eta)}[sampler]
        return self._steps(model, xt, self.timesteps(num_steps), partial(step, generator=generator))

    def timesteps(self, num_steps: int) -> list[int]:
        """num_steps + 1 evenly spaced timesteps from T-1 down to -1."""
        return [round(self.num_timesteps * (1 - i / num_steps)) - 1 for i in range(num_steps + 1)]

    @torch.no_grad()
    def _steps(self, model, xt, timesteps, step):
        for t, s in zip(timesteps, timesteps[1:]):
            noise_pred = model(xt, torch.full((len(xt),), t, device=xt.device)).to(xt.dtype)
            xt = step(xt, noise_pred, t, s)
            if s == -1 and not xt.isfinite().all():  # a bad number stays bad: one look at the end finds any
                raise ValueError("the network predicted a number that is not finite: its weights are damaged, or its "
                                 "precision is too low; load another checkpoint or sample in float32")
            yield s, xt
