"""The U-Net: a noisy image x_t and its timestep t -> the noise that the network sees in it."""

import inspect
import math
import os
import time
from collections.abc import Callable
from functools import partial

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

    def __init__(self, in_width: int, out_width: int, t_dim: int, dropout: float = 0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time = nn.Linear(t_dim, out_width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.conv1(x))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(h)))
        return h + self.shortcut(x)


class NormBlock(nn.Module):
    """The same with group normalisation before each convolution; the time scales and shifts the second one (adaptive group
    normalisation, Dhariwal and Nichol 2021, section 3). The last convolution is zero at first, the block just its shortcut.

    forward(x, time): x (B, in_width, H, W), time (B, t_dim) -> (B, out_width, H, W); the widths are multiples of 8.
    """

    def __init__(self, in_width: int, out_width: int, t_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time = nn.Linear(t_dim, 2 * out_width)
        self.norm2 = nn.GroupNorm(8, out_width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        self.shortcut = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return h + self.shortcut(x)


class Attention(nn.Module):
    """Self-attention over all positions of an image (Vaswani et al. 2017, section 3.2), 32 channels a head.

    forward(x): x (B, width, H, W), width a multiple of 32 -> the same shape. It begins as the identity.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.attention = nn.MultiheadAttention(width, width // 32, batch_first=True)
        zeroed(self.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, width)
        h, _ = self.attention(h, h, h, need_weights=x.device.type == "cpu")  # there, the path that has them is the quicker
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias of zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class U_net(nn.Module):
    """Predicts the noise in x_t: the network epsilon_theta(x_t, t) of Ho et al. 2020. Its defaults are the simplest form.

    device: where the network places itself.
    in_channels: 1 for grey, 3 for colour.
    t_dim: length of the time embedding, even.
    widths: channels of each level, finest first; every further level halves the resolution once more.
    blocks: residual blocks on each side of a level.
    bottleneck: channels at the lowest resolution, below all levels (None: those of the last level).
    attention: how many times self-attention and one more block follow the first block of the bottleneck.
    normalise: builds the network of `NormBlock`, a 3x3 convolution before the first and a normalised one after the last.
    patch: works on patches of patch x patch pixels as if they were channels of one, at a resolution lower by that factor.
    dropout: the share of channels' values that each block forgets in training, in [0, 1).

    `metadata` is a dictionary of plain values (image size, noise schedule, ...) that travels inside the state dict,
    beside `network`, the arguments that rebuild this network.
    """

    def __init__(self, device: str | torch.device = "cpu", in_channels: int = 1, t_dim: int = 256, *,
                 widths: tuple[int, ...] = (64, 128), blocks: int = 1, bottleneck: int | None = None, attention: int = 0,
                 normalise: bool = False, patch: int = 1, dropout: float = 0.0):
        super().__init__()
        if t_dim < 2 or t_dim % 2:
            raise ValueError(f"t_dim {t_dim}: must be even and positive, half of it are sines and half cosines")
        if in_channels < 1:
            raise ValueError(f"in_channels {in_channels}: must be at least 1; it is 1 for grey and 3 for colour images")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths {widths}: must be one positive number of channels for each level")
        bottom = widths[-1] if bottleneck is None else bottleneck
        if normalise and any(width % 8 for width in (*widths, bottom)):
            raise ValueError(f"widths {widths}, bottleneck {bottleneck}: must be multiples of 8 with normalise=True")
        if attention and bottom % 32:
            raise ValueError(f"bottleneck of {bottom} channels: must be a multiple of 32 with attention")
        if blocks < 1 or attention < 0 or patch < 1:
            raise ValueError(f"blocks {blocks}, attention {attention}, patch {patch}: must be at least 1, 0 and 1")
        self.network = {"in_channels": in_channels, "t_dim": t_dim, "widths": tuple(widths), "blocks": blocks,
                        "bottleneck": bottleneck, "attention": attention, "normalise": normalise, "patch": patch,
                        "dropout": dropout}
        self.metadata = {}

        block = partial(NormBlock if normalise else ResBlock, t_dim=t_dim, dropout=dropout)
        channels = in_channels * patch**2
        width = widths[0] if normalise else channels
        self.time_mlp = nn.Sequential(nn.Linear(t_dim, t_dim), nn.SiLU(), nn.Linear(t_dim, t_dim))
        self.stem = nn.Conv2d(channels, width, 3, padding=1) if normalise else nn.Identity()
        self.encoder, self.upsample, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for skip_width in widths:
            for _ in range(blocks):
                self.encoder.append(block(width, skip_width))
                width = skip_width
        self.bottleneck = block(width, bottom)
        self.attention = nn.ModuleList(Attention(bottom) for _ in range(attention))
        self.after_attention = nn.ModuleList(block(bottom, bottom) for _ in range(attention))
        width = bottom
        for skip_width in reversed(widths):
            self.upsample.append(nn.ConvTranspose2d(width, width, 2, stride=2))
            width += skip_width
            for _ in range(blocks):
                self.decoder.append(block(width, skip_width))
                width = skip_width
        self.out = nn.Conv2d(width, channels, 1) if not normalise else nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), zeroed(nn.Conv2d(width, channels, 3, padding=1)))
        self.to(device)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise.

        x (B, C, H, W) float, images in [-1, 1] plus noise, H and W >= 8; t (B,) int64 in 0 ... T-1 -> (B, C, H, W).
        Raises ValueError where a shape does not fit the network.
        """
        self._check(x, t)
        height, width = x.shape[-2:]
        blocks, patch = self.network["blocks"], self.network["patch"]
        multiple = patch * 2 ** len(self.upsample)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")

        time = self.time_mlp(sinusoidal_embedding(t, self.network["t_dim"]))  # (B, t_dim)
        x = self.stem(F.pixel_unshuffle(x, patch))
        skips = []
        for i, block in enumerate(self.encoder, start=1):
            x = block(x, time)
            if i % blocks == 0:  # the last of its level
                skips.append(x)
                x = F.max_pool2d(x, 2)
        x = self.bottleneck(x, time)
        for attention, block in zip(self.attention, self.after_attention):
            x = block(attention(x), time)
        for i, block in enumerate(self.decoder):
            if i % blocks == 0:  # the first of its level
                x = torch.cat([self.upsample[i // blocks](x), skips.pop()], dim=1)
            x = block(x, time)
        return F.pixel_shuffle(self.out(x), patch)[..., :height, :width]

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
        parameters = inspect.signature(U_net).parameters
        saved = {name: parameters[name].default for name in self.network} | state["network"]  # older files say less
        for name in saved:
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
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: not a checkpoint of this U_net; pass a model that train.ipynb wrote") from error
        return model


def bf16_is_faster(step: Callable[[], Tensor], device: str | torch.device) -> bool:
    """Whether `step` takes less than nine tenths of its fp32 time under bf16 autocast: the shortest of three runs each way.

    step: does the work in question on `device` and returns a tensor that comes last, so that the device can be waited for.
    Most GPUs gain from bf16; of CPUs some gain twofold and some, without instructions for it, lose tenfold.
    """
    def seconds(bf16: bool) -> float:
        times = []
        for _ in range(4):  # the first run warms up
            start = time.perf_counter()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                step().flatten()[0].item()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds(True) < 0.9 * seconds(False)
