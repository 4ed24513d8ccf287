"""The U-Net: a noisy image x_t and its timestep t -> the noise that the network sees in it."""

import math
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import load_checkpoint


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal position embedding (Vaswani et al. 2017, section 3.5) of the timesteps.

    t (B,), dim even -> (B, dim): sines, then cosines, of t at the dim / 2 frequencies 10000^(-2i / dim).
    """
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency  # (B, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the addition of the time embedding, and a shortcut past them (He et al. 2016).

    forward(x, time): x (B, in_width, H, W), time (B, t_dim) -> (B, out_width, H, W).
    """

    def __init__(self, in_width: int, out_width: int, t_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time = nn.Linear(t_dim, out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.conv1(x))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(h))
        return h + self.shortcut(x)


class U_net(nn.Module):
    """Predicts the noise in x_t: the network epsilon_theta(x_t, t) of Ho et al. 2020, in its simplest form.

    device: where the network places itself.
    in_channels: 1 for grey, 3 for colour.
    t_dim: length of the time embedding, even.
    widths: channels of each level, finest first; every further level halves the resolution once more.

    `metadata` is a dictionary of plain values (image size, noise schedule, ...) that travels inside the state dict,
    beside `network`, the arguments that rebuild this network.
    """

    def __init__(self, device: str | torch.device = "cpu", in_channels: int = 1, t_dim: int = 256, *,
                 widths: tuple[int, ...] = (64, 128)):
        super().__init__()
        if t_dim < 2 or t_dim % 2:
            raise ValueError(f"t_dim {t_dim}: must be even and positive, half of it are sines and half cosines")
        if in_channels < 1:
            raise ValueError(f"in_channels {in_channels}: must be at least 1; it is 1 for grey and 3 for colour images")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths {widths}: must be one positive number of channels for each level")
        self.network = {"in_channels": in_channels, "t_dim": t_dim, "widths": tuple(widths)}
        self.metadata = {}

        self.time_mlp = nn.Sequential(nn.Linear(t_dim, t_dim), nn.SiLU(), nn.Linear(t_dim, t_dim))
        self.encoder, self.upsample, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = in_channels
        for skip_width in widths:
            self.encoder.append(ResBlock(width, skip_width, t_dim))
            width = skip_width
        self.bottleneck = ResBlock(width, width, t_dim)
        for skip_width in reversed(widths):
            self.upsample.append(nn.ConvTranspose2d(width, width, 2, stride=2))
            self.decoder.append(ResBlock(width + skip_width, skip_width, t_dim))
            width = skip_width
        self.out = nn.Conv2d(width, in_channels, 1)
        self.to(device)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise.

        x (B, C, H, W) float, images in [-1, 1] plus noise, H and W >= 8; t (B,) int64 in 0 ... T-1 -> (B, C, H, W).
        Raises ValueError where a shape does not fit the network.
        """
        self._check(x, t)
        height, width = x.shape[-2:]
        multiple = 2 ** len(self.encoder)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")

        time = self.time_mlp(sinusoidal_embedding(t, self.network["t_dim"]))  # (B, t_dim)
        skips = []
        for block in self.encoder:
            x = block(x, time)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x, time)
        for upsample, block in zip(self.upsample, self.decoder):
            x = block(torch.cat([upsample(x), skips.pop()], dim=1), time)
        return self.out(x)[..., :height, :width]

    def _check(self, x: Tensor, t: Tensor) -> None:
        channels = self.network["in_channels"]
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[-2:]) < 8:
            raise ValueError(f"x of shape {tuple(x.shape)}: this network takes (B, {channels}, H, W) with H and W >= 8")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t of shape {tuple(t.shape)}: must be ({len(x)},), one timestep for each image of x")

    def get_extra_state(self) -> dict:
        """What the state dict carries besides weights: `network` and everything in `metadata`."""
        return {"network": self.network, **self.metadata}

    def set_extra_state(self, state: dict) -> None:
        """Takes over the metadata of a state dict. Raises ValueError where it belongs to a different network."""
        saved = state["network"]
        for name in self.network | saved:
            if saved.get(name) != self.network.get(name):
                raise ValueError(f"{name}: the checkpoint has {saved.get(name)}, this network has {self.network.get(name)}; "
                                 "build the network with the checkpoint's value or use U_net.from_checkpoint")
        self.metadata = {name: value for name, value in state.items() if name != "network"}

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "U_net":
        """Rebuilds the network that a checkpoint describes and loads its weights.

        Raises what `load_checkpoint` raises, and ValueError where the file is not a checkpoint of a U_net.
        """
        state = load_checkpoint(path, device)
        try:
            model = cls(device, **state["_extra_state"]["network"])
            model.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: not a checkpoint of this U_net; pass a model that train.ipynb wrote") from error
        return model


def bf16_is_faster(step: Callable[[], Tensor], device: str | torch.device) -> bool:
    """Whether `step` takes at most nine tenths of its fp32 time under bf16 autocast: a measurement of two runs each way.

    step: does the work in question on `device` and returns a tensor that comes last, so that the device can be waited for.
    Most GPUs gain from bf16; of CPUs some gain twofold and some, without instructions for it, lose tenfold.
    """
    def seconds(bf16: bool) -> float:
        for _ in range(2):  # the first run warms up
            start = time.perf_counter()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                step().flatten()[0].item()
        return time.perf_counter() - start

    return seconds(True) < 0.9 * seconds(False)
