"""The diffusion process: noise schedule, forward process, and one function for each kind of reverse step.

The timestep t = 0 ... T-1 in code is the paper's t = 1 ... T, and t = -1 is the clean image: alpha_bar
is 1 there, so that Eq. 11 and the others hold for the last step as well.

"Eq." without a name is of Ho, Jain and Abbeel 2020. Three noises: `noise` is the one that was drawn,
`noise_pred` the one that the network predicts, and each random step adds fresh noise of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recorded import recorded

Predictor = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> predicted noise: a network
SAMPLERS = ("ddpm", "ddim", "dpm_solver")
BLOCK = 64  # images whose noise is drawn together; each always gets the same part
RECORDING_PAYS = 6  # steps: from so many on a GPU records the network once and replays it
FILLS_A_GPU = 400_000  # pixels: batches of so many gain nothing by that (benchmarks/speed_gpu.md)


class NoiseScheduler(nn.Module):
    """The linear noise schedule of Ho et al. 2020, section 4, and the steps forward and back along it.

    num_timesteps: T, from 2. beta_start, beta_end: variance that the first and the last step add, in
    (0, 1).
    Buffers `beta`, `alpha` = 1 - beta and `alpha_bar`, the running product of alpha: (T,), computed in
    float64 and kept in float32. The steps compute their coefficients on the host in float64, since
    1 - alpha_bar loses four digits in float32 at t = 0; only float32 goes to the device.
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
                 device: str | torch.device = "cpu"):
        super().__init__()
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps {num_timesteps}: must be at least 2")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start {beta_start}, beta_end {beta_end}: must be "
                             "0 < beta_start <= beta_end < 1")
        self.num_timesteps = num_timesteps
        beta = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        self.register_buffer("beta", beta.float())
        self.register_buffer("alpha", (1 - beta).float())
        self.register_buffer("alpha_bar", alpha_bar.float())
        self.register_buffer("_signal", alpha_bar.sqrt().float(), persistent=False)  # √ᾱ
        self.register_buffer("_sigma", (1 - alpha_bar).sqrt().float(), persistent=False)  # √(1 - ᾱ)
        self._alpha_bar = torch.cat([torch.ones(1).double(), alpha_bar])  # from t = -1, on the host
        self.to(device)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Forward process in closed form (Eq. 4): x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.

        x0, noise (B, C, H, W), x0 in [-1, 1], noise standard normal; t (B,) int64 in 0 ... T-1
        -> x_t (B, C, H, W). Raises ValueError for a t of another shape or, on the CPU, out of range.
        """
        self._check(t, x0)
        for_each = (-1, *[1] * (x0.ndim - 1))  # a number for each image: (B, 1, 1, 1)
        signal, sigma = self._signal[t].view(for_each), self._sigma[t].view(for_each)
        return signal.to(x0.dtype) * x0 + sigma.to(x0.dtype) * noise

    def implied_x0(self, xt: Tensor, noise_pred: Tensor, t: int | Tensor) -> Tensor:
        """The image that a predicted noise implies, Eq. 4 solved for it (Eq. 15):
        x̂_0 = (x_t - √(1 - ᾱ_t) ε_θ) / √ᾱ_t.

        xt, noise_pred (B, C, H, W); t an int or (B,) int64 -> (B, C, H, W), not clamped to [-1, 1].
        """
        alpha_bar = self._alpha_bar_at(t, xt)
        signal, sigma = self._on(xt, alpha_bar**0.5, (1 - alpha_bar)**0.5)
        return (xt - sigma * noise_pred) / signal

    def timesteps(self, num_steps: int | None = None, spacing: float = 1.0) -> list[int]:
        """The timesteps that a walk of num_steps visits, from T-1 down to -1 (None: all T of them).

        T (1 - i / num_steps)^spacing - 1 for i = 0 ... num_steps, rounded: evenly spaced at 1, and
        closer together near the image above 1. Raises ValueError outside 1 ... T, or spacing <= 0.
        """
        num_steps = self.num_timesteps if num_steps is None else num_steps
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"num_steps {num_steps}: must be in 1 ... {self.num_timesteps}")
        if not 0 < spacing < math.inf:
            raise ValueError(f"spacing {spacing}: must be above 0; 1 spaces the timesteps evenly")
        T, timesteps = self.num_timesteps, [-1]
        for left in range(1, num_steps + 1):  # from the image up, so that no timestep comes twice
            most = T - num_steps + left  # which leaves room for the later ones
            t = min(round(T * (left / num_steps)**spacing), most) - 1
            timesteps.append(max(t, timesteps[-1] + 1))
        return timesteps[::-1]

    def sample_prev_timestep(self, xt: Tensor, noise_pred: Tensor, t: int | Tensor,
                             generator: Generators = None) -> Tensor:
        """One step of Algorithm 2: x_{t-1} drawn from p(x_{t-1} given x_t), Eq. 11's mean, Eq. 7's variance.

        xt, noise_pred (B, C, H, W); t an int or (B,) int64 -> x_{t-1}. At t = 0 the variance is 0:
        no noise is added.
        """
        return self.ddpm_step(xt, noise_pred, t, t - 1, generator)

    def ddpm_step(self, xt: Tensor, noise_pred: Tensor, t: int | Tensor, s: int | Tensor,
                  generator: Generators = None) -> Tensor:
        """The step of Algorithm 2 ("ancestral"), from t to any earlier s; the steps between count as one.

        With α = ᾱ_t / ᾱ_s and β = 1 - α (Nichol and Dhariwal 2021, section 4):
        Eq. 11: mean = (x_t - β / √(1 - ᾱ_t) ε_θ) / √α; Eq. 7: variance = (1 - ᾱ_s) / (1 - ᾱ_t) β.
        xt, noise_pred (B, C, H, W); t and s ints or (B,) int64, s from -1 -> x_s (B, C, H, W).
        Raises ValueError for a timestep out of range, and where ints s >= t.
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bars(t, s, xt)
        alpha = alpha_bar_t / alpha_bar_s
        beta = 1 - alpha
        of_noise, of_mean = beta / (1 - alpha_bar_t)**0.5, 1 / alpha**0.5
        sigma = ((1 - alpha_bar_s) / (1 - alpha_bar_t) * beta)**0.5
        of_noise, of_mean, sigma = self._on(xt, of_noise, of_mean, sigma)
        mean = of_mean * (xt - of_noise * noise_pred)
        return (mean + sigma * gaussian_noise(xt, generator)).to(xt.dtype)

    def ddim_step(self, xt: Tensor, noise_pred: Tensor, t: int | Tensor, s: int | Tensor,
                  eta: float = 0.0, generator: Generators = None) -> Tensor:
        """Step from t to any earlier s of Song et al. 2021 (DDIM), Eq. 12 there.

        The predicted noise is put back in place of fresh noise: with eta = 0 x_0 is a function of the
        first x_t. eta scales the fresh noise of their Eq. 16; eta = 1 is the ancestral step.
        Shapes and errors as in `ddpm_step`; ValueError as well where eta is not in [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: must be in 0 ... 1")
        alpha_bar_t, alpha_bar_s = self._alpha_bars(t, s, xt)
        x0 = self.implied_x0(xt, noise_pred, t)
        sigma = eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))**0.5
        back = abs(1 - alpha_bar_s - sigma**2)**0.5  # with the fresh noise it has the variance 1 - ᾱ_s
        signal, back, sigma = self._on(xt, alpha_bar_s**0.5, back, sigma)
        xs = signal * x0 + back * noise_pred
        if eta > 0:
            xs = xs + sigma * gaussian_noise(xt, generator)
        return xs.to(xt.dtype)

    def dpm_solver(self, eta: float = 1.0) -> Callable[..., Tensor]:
        """A solver that needs few steps, a variant of DPM-Solver++(2M) (Lu et al. 2022).

        DDIM takes the implied image x̂_0 to stay as it is during a step, but it changes on the way. This
        takes it to go on changing as on the step before, reckons its mean over the step, and makes the
        step of DDIM with that. eta = 0 adds no fresh noise and eta = 1 that of the ancestral step.

        In formulas, which one can skip: let λ = log √(ᾱ / (1 - ᾱ)), half the log of the signal-to-noise
        ratio. In ever smaller steps the walk becomes a differential equation in λ, an ODE without fresh
        noise and an SDE, which has a random term, with it. From t to s, h = λ_s - λ_t, its exact solution
        (Eq. 8 there; section 5 for the SDE) sees x̂_0 at each λ with the weight e^{kλ}, where k = 1 + eta².
        Where x̂_0 goes on in a straight line as it moved from u, the timestep before, to t, its weighted
        mean is

            D = x̂_0(t) + (h / (1 - e^{-kh}) - 1 / k) (x̂_0(t) - x̂_0(u)) / (λ_t - λ_u)

        (Algorithm 2 there has h / 2 in place of the bracket, close to it where h is small.) The first
        step has no step before it, and the last, where λ_s is infinite, takes x̂_0 as it is. Between
        eta = 0 and 1 the fresh noise is DDIM's, which is not quite that of the SDE.

        Returns step(xt, noise_pred, t, s, generator=None) -> x_s, t and s int. It keeps the prediction
        of the step before: make a new one for each batch.
        """
        u, x0_u = None, None

        def step(xt: Tensor, noise_pred: Tensor, t: int, s: int, generator: Generators = None) -> Tensor:
            nonlocal u, x0_u
            x0 = self.implied_x0(xt, noise_pred, t)
            if u is not None and s >= 0:
                lambda_u, lambda_t, lambda_s = map(self._half_log_snr, (u, t, s))
                h, k = lambda_s - lambda_t, 1 + eta**2
                slope = (x0 - x0_u) / (lambda_t - lambda_u)
                correction = (h / -math.expm1(-k * h) - 1 / k) * slope  # D - x̂_0
                # By Eq. 4 an image larger by c means a noise smaller by √ᾱ / √(1 - ᾱ) c = e^λ c
                noise_pred = noise_pred - math.exp(lambda_t) * correction
            u, x0_u = t, x0
            return self.ddim_step(xt, noise_pred, t, s, eta, generator)
        return step

    def denoise(self, model: Predictor, xt: Tensor, num_steps: int | None = None, sampler: str = "ddpm",
                generator: Generators = None, eta: float | None = None, spacing: float = 1.0,
                last: Predictor | None = None) -> Iterator[tuple[int, Tensor]]:
        """The reverse process from pure noise to images, one evaluation of the network for each step.

        model(x, t): predicts the noise; xt (B, C, H, W): standard normal, the x_t of t = T-1.
        num_steps, spacing: which timesteps are visited, see `timesteps`; None: all T.
        sampler: "ddpm" (ancestral), "ddim" or "dpm_solver".
        eta: how much of the ancestral step's fresh noise "ddim" (None: 0) and "dpm_solver" (None: 1)
        add, in [0, 1].
        last(x, t): makes the last prediction in place of model; the image that it implies is the result.
        Where model is guided, the network alone leaves less error there.
        Yields (t, x_t) after each step, t strictly decreasing, at last (-1, x_0): images in about
        [-1, 1]. Raises ValueError for a value that is none of these, and where the network predicts a
        number that is not finite.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
        if eta is None:
            eta = 0.0 if sampler == "ddim" else 1.0
        if not 0 <= eta <= 1 or (sampler == "ddpm" and eta != 1):
            raise ValueError(f"eta {eta}: must be in 0 ... 1, and 1 or None with sampler 'ddpm'")
        step = {"ddpm": self.ddpm_step, "ddim": partial(self.ddim_step, eta=eta),
                "dpm_solver": self.dpm_solver(eta)}[sampler]
        return self._steps(model, xt, self.timesteps(num_steps, spacing), step, generator, last)

    @torch.no_grad()
    def _steps(self, model, xt, timesteps, step, generator, last):
        if xt.is_cuda and len(timesteps) > RECORDING_PAYS and xt.numel() < FILLS_A_GPU:
            model = recorded(model, plain_calls=1)  # a small batch waits for its launches
        for t, s in pairwise(timesteps):
            predict = last if last and s == -1 else model
            xt = step(xt, self._predict(predict, xt, t), t, s, generator=generator)
            if s == -1:  # a bad number stays bad: one look at the end is enough
                self._check_finite(xt)
            yield s, xt

    # For edit_image.ipynb alone, which explains it

    def renoise_step(self, xs: Tensor, s: int | Tensor, t: int | Tensor,
                     generator: Generators = None) -> Tensor:
        """Forward process from s to any later t: noise is added to what has some.

        Eq. 2 over all steps between, with α = ᾱ_t / ᾱ_s: x_t = √α x_s + √(1 - α) z.
        xs (B, C, H, W); s and t ints or (B,) int64, from -1 -> x_t (B, C, H, W). For
        t = s it is x_s. Raises ValueError for a timestep out of range, and where ints
        t < s.
        """
        if not (isinstance(t, Tensor) or isinstance(s, Tensor)) and t < s:
            raise ValueError(f"noise from timestep {s} to {t}: must go to a later one")
        alpha_bar_t, alpha_bar_s = (self._alpha_bar_at(at, xs, -1) for at in (t, s))
        alpha = alpha_bar_t / alpha_bar_s
        signal, sigma = self._on(xs, alpha**0.5, (1 - alpha)**0.5)
        return signal * xs + sigma * gaussian_noise(xs, generator)

    def inpaint(self, model: Predictor, xt: Tensor, known: Tensor, mask: Tensor,
                num_steps: int | None = None, jump: int = 10, repeats: int = 10,
                generator: Generators = None) -> Iterator[tuple[int, Tensor]]:
        """Fills a hole in images: RePaint (Lugmayr et al. 2022, Algorithm 1).

        Each step down takes the unknown pixels from the reverse step and the known ones
        from the forward process of the given image (their Eq. 8):

            x_s = m (√ᾱ_s x_0 + √(1 - ᾱ_s) z) + (1 - m) (drawn from p(x_s given x_t))

        The reverse step does not know the known pixels of this x_s, so the parts fit
        badly. Therefore some noise is added again, up to a t where the network sees
        both, and the steps are walked once more: see `resampling_walk`. Even so the
        result only comes near a draw from the images with these known pixels.
        model, xt, num_steps, generator: as for `denoise`; known (B, C, H, W): images in
        [-1, 1]; mask (H, W) bool: True where they are known.
        Yields (t, x_t) after each step, at last (-1, x_0), whose known pixels are
        exactly those given. Raises ValueError for a mask or image of another shape, and
        where `denoise` does.
        """
        if known.shape != xt.shape:
            raise ValueError(f"known images of shape {tuple(known.shape)}: must be "
                             f"{tuple(xt.shape)}, as the noise")
        if mask.shape != xt.shape[-2:] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} and {mask.dtype}: must be "
                f"{tuple(xt.shape[-2:])} and torch.bool, True where a pixel is known")
        walk = resampling_walk(self.timesteps(num_steps), jump, repeats)
        return self._inpaint(model, xt, known, mask, walk, generator)

    @torch.no_grad()
    def _inpaint(self, model, xt, known, mask, walk, generator):
        for t, s in pairwise(walk):
            if s > t:
                xt = self.renoise_step(xt, t, s, generator)
            else:
                xs = self.ddpm_step(xt, self._predict(model, xt, t), t, s, generator)
                xt = torch.where(mask, self.renoise_step(known, -1, s, generator), xs)
            if s == -1:
                self._check_finite(xt)
            yield s, xt

    @torch.no_grad()
    def invert(self, model: Predictor, x0: Tensor,
               num_steps: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """DDIM inversion: from images to the noise from which "ddim" draws them.

        With eta = 0 DDIM follows an ordinary differential equation (Song et al. 2021,
        Eq. 13 and 14), which leads up as well as down. The step of `ddim_step` from s
        to a later t, with the noise that is predicted at its beginning:

            x_t = √ᾱ_t x̂_0 + √(1 - ᾱ_t) ε_θ,   x̂_0 = (x_s - √(1 - ᾱ_s) ε_θ) / √ᾱ_s

        The way down predicts at the other end of each step, so it leads back the better
        the smaller the steps are.
        model, num_steps: as for `denoise`; x0 (B, C, H, W): images in [-1, 1].
        Yields (t, x_t) after each step, t strictly increasing, at last (T-1, x_t),
        about standard normal, but with too little noise where the image is flat.
        Raises ValueError where `denoise` does.
        """
        xs = x0
        for s, t in pairwise(self.timesteps(num_steps)[::-1]):
            noise_pred = self._predict(model, xs, max(s, 0))  # -1 is no timestep to it
            alpha_bar_t, alpha_bar_s = self._alpha_bars(t, s, xs)
            signal = (alpha_bar_t / alpha_bar_s)**0.5
            of_noise = (1 - alpha_bar_t)**0.5 - signal * (1 - alpha_bar_s)**0.5
            xs = signal * xs + of_noise * noise_pred
            if t == self.num_timesteps - 1:
                self._check_finite(xs)
            yield t, xs

    def bound_terms(self, x0: Tensor, noise: Tensor, noise_pred: Tensor,
                    t: Tensor) -> Tensor:
        """A term of the variational bound on -log p(x_0) (Eq. 5), in bits a dimension.

        What a step costs: how far the network's p(x_{t-1} given x_t) is from
        q(x_{t-1} given x_t, x_0), which knows the image. Both are normal, of one
        variance (Eq. 7). With the signal-to-noise ratio SNR = ᾱ / (1 - ᾱ) their
        divergence is (Eq. 12; Kingma et al. 2021, section 4)

            L_t = 1/2 (SNR_{t-1} / SNR_t - 1) |ε - ε_θ(x_t, t)|²

        The last step, t = 0, names one of 256 levels: -log of `discretised_gaussian`
        around the implied image, of variance β. The bound is the expectation, over the
        noise, of the sum over all t, and `prior_term`.
        x0, noise, noise_pred (B, C, H, W), x0 = level / 127.5 - 1; t (B,) int64
        -> (B,). Raises ValueError for a t of another shape, or out of range.
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bars(t, t - 1, x0)
        snr_t, snr_s = (a / (1 - a) for a in (alpha_bar_t, alpha_bar_s))
        weight, spread = self._on(x0, (snr_s / snr_t - 1) / 2, snr_t**-0.5)
        sigma, error = (1 - self._alpha_bar[1].item())**0.5, noise - noise_pred
        last = -discretised_gaussian(x0, x0 + spread * error, sigma)
        each = torch.where(weight.isinf(), last, weight * error**2)
        return each.flatten(1).mean(dim=1) / math.log(2)

    def prior_term(self, x0: Tensor) -> Tensor:
        """The first term of Eq. 5, in bits a dimension: how far x_T is from pure noise.

        The divergence of q(x_T given x_0) from N(0, I):
        (ᾱ_T x_0² - ᾱ_T - log(1 - ᾱ_T)) / 2. x0 (B, C, H, W) -> (B,).
        """
        alpha_bar = self._alpha_bar[-1].item()
        each = (alpha_bar * (x0**2 - 1) - math.log1p(-alpha_bar)) / 2
        return each.flatten(1).mean(dim=1) / math.log(2)

    # What the others share

    def _alpha_bar_at(self, t: int | Tensor, like: Tensor, first: int = 0) -> float | Tensor:
        """alpha_bar_t in float64 on the host: a number for an int t, (B, 1, 1, 1) for t (B,).

        Raises ValueError where t is not in first ... T-1.
        """
        if isinstance(t, Tensor):
            t = t.cpu()
        self._check(t, like, first)
        if not isinstance(t, Tensor):
            return self._alpha_bar[t + 1].item()
        return self._alpha_bar[t + 1].view(-1, *[1] * (like.ndim - 1))

    def _alpha_bars(self, t: int | Tensor, s: int | Tensor, like: Tensor) -> tuple:
        if not (isinstance(t, Tensor) or isinstance(s, Tensor)) and s >= t:
            raise ValueError(f"a step from timestep {t} to {s}: must go to an earlier one")
        return self._alpha_bar_at(t, like), self._alpha_bar_at(s, like, first=-1)

    def _check(self, t: int | Tensor, like: Tensor, first: int = 0) -> None:
        low = high = t
        if isinstance(t, Tensor):
            if t.shape != like.shape[:1]:
                raise ValueError(f"t of shape {tuple(t.shape)}: must be ({len(like)},), one timestep "
                                 "for each image")
            if t.device.type != "cpu" or not len(t) or torch.compiler.is_compiling():
                return  # a look at numbers on a GPU would halt its queue of work
            low, high = t.aminmax()
        if low < first or high >= self.num_timesteps:
            wrong = int(low if low < first else high)
            raise ValueError(f"timestep {wrong}: must be in {first} ... {self.num_timesteps - 1}")

    @staticmethod
    def _on(like: Tensor, *coefficients: float | Tensor) -> list[float | Tensor]:
        """Coefficients of the host to multiply `like` by: in its type and on its device."""
        return [c.to(like.dtype).to(like.device) if isinstance(c, Tensor) else c for c in coefficients]

    @staticmethod
    def _predict(model: Predictor, x: Tensor, t: int) -> Tensor:
        return model(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)

    @staticmethod
    def _check_finite(x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError("the network predicted a number that is not finite: its "
                             "weights are damaged, or its precision is too low; load "
                             "another checkpoint or sample in float32")

    def _half_log_snr(self, t: int) -> float:
        alpha_bar = self._alpha_bar[t + 1].item()
        return math.log(alpha_bar / (1 - alpha_bar)) / 2


# Guidance

def autoguided(model: Predictor, guide: Predictor, guidance: float) -> Predictor:
    """Guidance: a prediction that goes on past `model`, away from a weaker `guide`.

        ε = ε_guide + w (ε_model - ε_guide)

    The guide may be the same network early in its training (autoguidance, Karras et al. 2024, section
    4), which errs in the same direction and further, or the same network without its label
    (classifier-free guidance, Ho and Salimans 2022), which lacks what the label adds. Where both agree
    nothing changes.
    guidance: w. 1 is `model` alone; more draws clearer and, in the end, less varied images.
    Raises ValueError below 1.
    """
    if not guidance >= 1:
        raise ValueError(f"guidance {guidance}: must be at least 1, which draws without the guide")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        weaker = guide(x, t).to(x.dtype)  # the difference of two predictions in bf16 has few digits left
        return weaker + guidance * (model(x, t) - weaker)
    return predict


# Random numbers

def random_stream(*numbers: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A random stream for a row of numbers in 0 ... 2^32 - 1, such as (seed, step).

    Different rows of one length give different streams (torch keeps 32 bits on the CPU, so that of 100,000
    one or two may share theirs).
    """
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state))


class ImageStreams:
    """The random streams of images of one seed; image i gets the same noise whatever is drawn with it.

    64 images share a stream. Noise is drawn for all 64, and what was not asked for is dropped:
    for a thousand images that costs as much as one stream for all of them.
    """

    def __init__(self, seed: int, images: range, device: str | torch.device = "cpu"):
        blocks = range(images.start // BLOCK, -(-images.stop // BLOCK))
        self.images, self.first = images, images.start - blocks.start * BLOCK
        self.streams = [random_stream(seed, block, device=device) for block in blocks]

    def normal(self, like: Tensor) -> Tensor:
        """The next standard normal noise of each image, (len(images), ...), like `like` (B, ...)."""
        device = self.streams[0].device
        noise = torch.empty(len(self.streams), BLOCK, *like.shape[1:], dtype=like.dtype, device=device)
        for block, stream in zip(noise, self.streams):
            block.normal_(generator=stream)
        return noise.flatten(0, 1)[self.first:self.first + len(self.images)]


Generators = torch.Generator | ImageStreams | None


def image_generators(seed: int, images: range, device: str | torch.device = "cpu") -> ImageStreams:
    """The random streams of the images of `seed` with these numbers, for `gaussian_noise` and the samplers.

    images: consecutive numbers from 0, at least one. device: where they draw; another one draws others.
    Raises ValueError for other numbers.
    """
    if not len(images) or images.start < 0 or images.step != 1:
        raise ValueError(f"images {images}: must be a range of consecutive numbers from 0")
    return ImageStreams(seed, images, device)


def image_labels(label: str | int | list | None, seed: int, images: range, classes: list[str],
                 counts: list[int], device: str | torch.device = "cpu") -> Tensor | None:
    """The label of each image of `seed`, (B,) int64, or None where the network knows no classes.

    label: the name or number of a class; a list of them, which the images take in turn; or None: each
    image draws one from its own stream, as frequent as in the training data (`counts`; none: all alike).
    Raises ValueError for a label that is none of `classes`.
    """
    if not classes:
        if label is not None:
            raise ValueError(f"label {label!r}: this network was trained without labels; set label = None")
        return None
    if label is None:
        weights = torch.tensor(counts or [1] * len(classes), dtype=torch.float64)
        drawn = [torch.multinomial(weights, 1, generator=random_stream(seed, i, 1)) for i in images]
        return torch.cat(drawn).to(device)
    wanted = list(label) if isinstance(label, (list, tuple)) else [label]
    if not wanted:
        raise ValueError(f"label []: choose from {', '.join(classes)}")
    numbers = [class_number(one, classes) for one in wanted]
    return torch.tensor([numbers[i % len(numbers)] for i in images], device=device)


def class_number(label: str | int, classes: list[str]) -> int:
    """The number of a class: by its name, or that number itself where no class is named by a number.

    Raises ValueError for a label that is none of `classes`.
    """
    name, numbers = str(label), list(range(len(classes)))
    if name in classes:
        return classes.index(name)
    if any(map(str.isdecimal, classes)):  # the number 7 is the class "7" or "07", the seventh or not
        numbers = [int(other) if other.isdecimal() else None for other in classes]
    if name.isdecimal() and int(name) in numbers:
        return numbers.index(int(name))
    raise ValueError(f"label {label!r}: choose from {', '.join(classes)}")


def gaussian_noise(like: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise of the shape, type and device of `like` (B, ...).

    generator: None for the global stream, a generator for the whole batch, or `image_generators` of B
    images. Raises ValueError where these are not B.
    """
    if isinstance(generator, ImageStreams):
        if len(generator.images) != len(like):
            raise ValueError(f"the streams of {len(generator.images)} images for {len(like)}: pass those of "
                             "the images of this batch")
        return generator.normal(like).to(like.device)
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


# What edit_image.ipynb needs besides

def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985): along an arc from a (weight 0) to b (1).

        sin((1 - w) θ) / sin θ a + sin(w θ) / sin θ b,   θ the angle between a and b

    Two independent noises are nearly at right angles, so halfway between them the
    straight line is shorter by a factor of about √2. The arc keeps their length.
    a, b (B, ...) -> (B, ...). Undefined where they are opposite.
    """
    one, other = (F.normalize(x.flatten(1)) for x in (a, b))
    angle = 2 * torch.atan2((one - other).norm(dim=1), (one + other).norm(dim=1))
    angle = angle.clamp(min=1e-3)  # below that, arc and line are the same
    angle = angle.view(-1, *[1] * (a.ndim - 1))
    return (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()


def resampling_walk(timesteps: list[int], jump: int, repeats: int) -> list[int]:
    """The timesteps that RePaint visits (Lugmayr et al. 2022, section 4.2).

    timesteps: of a walk down. Each stretch of `jump` steps is walked `repeats` times:
    from its end back up to its start, and down again. repeats = 1 is the plain walk.
    Raises ValueError where jump or repeats is below 1.
    """
    if jump < 1 or repeats < 1:
        raise ValueError(f"jump {jump}, repeats {repeats}: both must be at least 1; "
                         "repeats = 1 walks straight down")
    walk = timesteps[:1]
    for first in range(0, len(timesteps) - 1, jump):
        stretch = timesteps[first:first + jump + 1]
        walk += stretch[1:] + (repeats - 1) * stretch
    return walk


def discretised_gaussian(x0: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """log p(x_0) of each pixel, one of 256 levels: a normal distribution in bins.

    Eq. 13: the integral of N(mean, sigma²) over the bin of x_0, 2 / 255 wide. The first
    and last bin, of -1 and 1, reach to infinity, so that the 256 levels sum to one.
    x0, mean of one shape, x0 = level / 127.5 - 1; sigma > 0 -> nats, of their shape.
    """
    lower = torch.where(x0 < -1 + 1 / 255, -math.inf, x0 - 1 / 255 - mean) / sigma
    upper = torch.where(x0 > 1 - 1 / 255, math.inf, x0 + 1 / 255 - mean) / sigma
    right = lower > -upper  # there both integrals round to 1, so mirror it
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    lower, upper = (torch.special.log_ndtr(x.cpu()).to(x.device)  # Apple's GPUs lack it
                    for x in (lower, upper))
    return upper + torch.log(-torch.expm1(lower - upper))
