"""The U-Net: a noisy image x_t, its timestep t and perhaps a label -> the noise in x_t.

The simple network comes first; of what follows its forward pass uses `pad` alone. The larger one,
`LargerUnet`, is built by the same call, `U_net(...)`, where an argument is one that only it has.
"""

import inspect
import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import load_checkpoint
from machine import memory_is_full


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal position embedding (Vaswani et al. 2017, section 3.5) of the timesteps.

    t (B,), dim even -> (B, dim): sines, then cosines, of t at dim / 2 frequencies, 10000^(-2i / dim).
    """
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency  # (B, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the addition of the time, and a shortcut past them (He et al. 2016).

    forward(x, time): x (B, in_width, H, W), time (B, t_dim) -> (B, out_width, H, W).
    """

    def __init__(self, in_width: int, out_width: int, t_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time = nn.Linear(t_dim, out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = (nn.Identity() if in_width == out_width else
                         nn.Conv2d(in_width, out_width, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.conv1(x))
        h = h + self.time(F.silu(time))[:, :, None, None]  # one number a channel, for all its pixels
        h = self.conv2(F.silu(h))
        return h + self.shortcut(x)


class Metadata(dict):
    """What a checkpoint says of itself; ValueError for what it does not say."""

    def __missing__(self, name: str):
        raise ValueError(f"{name}: the checkpoint does not say it; set model.metadata[{name!r}] as "
                         "train.ipynb does, and save it anew")


class U_net(nn.Module):
    """Predicts the noise in x_t: the network epsilon_theta(x_t, t) of Ho et al. 2020.

    device: where the network places itself.
    in_channels: 1 for grey, 3 for colour.
    t_dim: length of the time embedding, even.
    widths: channels of each level, finest first; each further level halves the resolution.
    num_classes: how many labels there are; 0: the network knows no labels.
    With any argument that only `LargerUnet` has, the call builds one of those.

    `network` holds the arguments that rebuild this network, and `metadata` plain values beside
    them (image size, noise schedule, ...); both travel inside the state dict.
    """

    def __new__(cls, *_, **arguments):  # where an argument is one that only `LargerUnet` has, that is built
        of_larger = arguments.keys() - inspect.signature(U_net.__init__).parameters.keys()
        return super().__new__(LargerUnet if cls is U_net and of_larger else cls)

    def __init__(self, device: str | torch.device = "cpu", in_channels: int = 1, t_dim: int = 256,
                 *, widths: tuple[int, ...] = (64, 128), num_classes: int = 0):
        super().__init__()
        self._describe(in_channels=in_channels, t_dim=t_dim, widths=tuple(widths),
                       num_classes=num_classes)
        self._embed_time_and_label()
        self.encoder, self.upsample = nn.ModuleList(), nn.ModuleList()
        self.decoder = nn.ModuleList()
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
        self.to(device, memory_format=torch.channels_last)  # the layout that convolutions are quickest in

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Predicted noise, (B, C, H, W).

        x (B, C, H, W) float: images in [-1, 1] plus noise, H and W >= 8.
        t (B,) int64 in 0 ... T-1.
        label (B,) int64 in 0 ... num_classes-1, or num_classes for "no label"; None: no label for all.
        Raises ValueError where a shape, type or label does not fit the network.
        """
        self._check(x, t, label)
        height, width = x.shape[-2:]
        x = pad(x, multiple=2 ** len(self.upsample))
        time = self.embed(t, label)  # (B, t_dim)
        skips = []
        for block in self.encoder:
            x = block(x, time)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x, time)
        for upsample, block in zip(self.upsample, self.decoder):
            x = torch.cat([upsample(x), skips.pop()], dim=1)
            x = block(x, time)
        return self.out(x)[..., :height, :width]

    def embed(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        """What every block is told, (B, t_dim): the time, and the label where there are classes."""
        embedding = sinusoidal_embedding(t, self.network["t_dim"])
        time = self.time_mlp(embedding.to(self.time_mlp[0].weight.dtype))
        num_classes = self.network["num_classes"]
        if not num_classes:
            return time
        return time + self.label_embedding(torch.full_like(t, num_classes) if label is None else label)

    def _embed_time_and_label(self) -> None:
        t_dim, num_classes = self.network["t_dim"], self.network["num_classes"]
        self.time_mlp = nn.Sequential(nn.Linear(t_dim, t_dim), nn.SiLU(), nn.Linear(t_dim, t_dim))
        if num_classes:  # one row for each class, and the last for "no label"
            self.label_embedding = zeroed(nn.Embedding(num_classes + 1, t_dim))

    def _describe(self, **network) -> None:
        """Keeps the arguments that rebuild the network. Raises ValueError for a bad one."""
        self.network, self.metadata = network, {}
        t_dim, widths = network["t_dim"], network["widths"]
        if t_dim < 2 or t_dim % 2:
            raise ValueError(f"t_dim {t_dim}: must be even and positive, half sines and half cosines")
        if network["in_channels"] < 1:
            raise ValueError(f"in_channels {network['in_channels']}: must be at least 1; "
                             "it is 1 for grey and 3 for colour images")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths {widths}: must be one positive number of channels a level")
        if network["num_classes"] < 0:
            raise ValueError(f"num_classes {network['num_classes']}: must be 0 (no labels) or more")

    def _check(self, x: Tensor, t: Tensor, label: Tensor | None) -> None:
        channels, num_classes = self.network["in_channels"], self.network["num_classes"]
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[-2:]) < 8:
            raise ValueError(f"x of shape {tuple(x.shape)}: this network takes (B, {channels}, H, W) "
                             "with H and W >= 8")
        widths, patch = self.network["widths"], self.network.get("patch", 1)
        if patch * 2**len(widths) > 2 * max(x.shape[-2:]):  # mostly padding
            raise ValueError(f"widths {widths}, patch {patch}: too many levels for images of "
                             f"{x.shape[-2]} x {x.shape[-1]}; each level halves them")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t of shape {tuple(t.shape)}: must be ({len(x)},), one timestep for "
                             "each image of x")
        if label is None:
            return
        if not num_classes:
            raise ValueError("label: this network was built without classes; pass None, or build it "
                             "with num_classes")
        if not isinstance(label, Tensor):
            raise ValueError(f"label {label!r}: must be a tensor of ({len(x)},) and torch.int64, one number "
                             "for each image of x")
        if label.shape != t.shape or label.dtype != torch.int64:
            raise ValueError(f"label of shape {tuple(label.shape)} and type {label.dtype}: must be "
                             f"({len(x)},) and torch.int64, one number for each image of x")
        if not torch.compiler.is_compiling() and label.device.type == "cpu" and len(label):
            low, high = label.aminmax()  # on a GPU a look at the numbers would halt the queue of work
            if low < 0 or high > num_classes:
                raise ValueError(f"label {int(low if low < 0 else high)}: must be in 0 ... "
                                 f"{num_classes - 1}, or {num_classes} for no label")

    def get_extra_state(self) -> dict:
        """What the state dict carries besides weights: `network`, and everything in `metadata`."""
        return {"network": self.network, **self.metadata}

    def set_extra_state(self, state: dict) -> None:
        """Takes over the metadata of a state dict. ValueError where it is of another network."""
        saved = default_arguments() | state["network"]  # older files say less
        saved["widths"] = tuple(saved["widths"])  # JSON has lists alone
        mine = default_arguments() | self.network
        for name in saved:
            if saved.get(name) != mine.get(name):
                raise ValueError(f"{name}: the checkpoint has {saved.get(name)}, this network has "
                                 f"{mine.get(name)}; build the network with the checkpoint's value "
                                 "or use U_net.from_checkpoint")
        self.metadata = Metadata((name, value) for name, value in state.items() if name != "network")

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "U_net":
        """Rebuilds the network that a checkpoint describes and loads its weights.

        Raises FileNotFoundError where there is no file and ValueError where it is no such checkpoint.
        """
        state = load_checkpoint(path, device)
        try:
            network = state["_extra_state"]["network"]
            defaults = default_arguments()  # any of LargerUnet's, even its default, would build one
            model = cls(device, **{name: value for name, value in network.items()
                                   if name not in defaults or value != defaults[name]})
            model.load_state_dict(state)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if memory_is_full(error):
                raise
            raise ValueError(f"{path}: not a checkpoint of this U_net; pass a model that train.ipynb "
                             "wrote") from error
        return model


def pad(x: Tensor, multiple: int) -> Tensor:
    """Repeats the last row and column until height and width are multiples of `multiple`."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias of zero: at first it adds nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# The larger network: normalisation, attention, patches, more blocks

class NormBlock(nn.Module):
    """ResBlock with group normalisation before each convolution.

    The time scales and shifts the second normalisation (adaptive group normalisation, Dhariwal and
    Nichol 2021, section 3). The last convolution is zero at first, the block just its shortcut.
    forward(x, time): x (B, in_width, H, W), time (B, t_dim) -> (B, out_width, H, W); the widths are
    multiples of 8. dropout: the share of values that are set to zero in training, in [0, 1).
    """

    def __init__(self, in_width: int, out_width: int, t_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time = nn.Linear(t_dim, 2 * out_width)
        self.norm2 = nn.GroupNorm(8, out_width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        self.shortcut = (nn.Identity() if in_width == out_width else
                         nn.Conv2d(in_width, out_width, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return h + self.shortcut(x)


class DropoutBlock(ResBlock):
    """ResBlock that sets a share `dropout` of its values to zero in training."""

    def __init__(self, in_width: int, out_width: int, t_dim: int, dropout: float):
        super().__init__(in_width, out_width, t_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.conv1(x))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(h)))
        return h + self.shortcut(x)


class Attention(nn.Module):
    """Self-attention over all positions of an image (Vaswani et al. 2017, section 3.2).

    Each head has 32 channels. forward(x): x (B, width, H, W), width a multiple of 32 -> the same
    shape. At first it is the identity.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.attention = nn.MultiheadAttention(width, width // 32, batch_first=True)
        zeroed(self.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, width)
        on_cpu = x.device.type == "cpu"  # where the path that returns the weights is the quicker
        h, _ = self.attention(h, h, h, need_weights=on_cpu)
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])


class LargerUnet(U_net):
    """The U-Net with what strong networks have besides; `U_net(...)` builds it where asked for one.

    blocks: residual blocks on each side of a level.
    bottleneck: channels at the lowest resolution, below all levels (None: those of the last level).
    attention: how many times self-attention and one more block follow the bottleneck's first block.
    normalise: builds `NormBlock`s, a 3x3 convolution before the first and a normalised one at the end.
    patch: works on patches of patch x patch pixels as channels of one, at a lower resolution.
    dropout: the share of values that each block sets to zero in training, in [0, 1).
    The other arguments, and forward, are those of `U_net`.
    """

    def __init__(self, device: str | torch.device = "cpu", in_channels: int = 1, t_dim: int = 256,
                 *, widths: tuple[int, ...] = (64, 128), num_classes: int = 0, blocks: int = 1,
                 bottleneck: int | None = None, attention: int = 0, normalise: bool = False,
                 patch: int = 1, dropout: float = 0.0):
        nn.Module.__init__(self)
        self._describe(in_channels=in_channels, t_dim=t_dim, widths=tuple(widths),
                       num_classes=num_classes, blocks=blocks, bottleneck=bottleneck,
                       attention=attention, normalise=normalise, patch=patch, dropout=dropout)
        bottom = widths[-1] if bottleneck is None else bottleneck
        self._check_larger(bottom)
        block = partial(NormBlock if normalise else DropoutBlock, t_dim=t_dim, dropout=dropout)
        channels = in_channels * patch**2
        width = widths[0] if normalise else channels
        self._embed_time_and_label()
        self.stem = nn.Conv2d(channels, width, 3, padding=1) if normalise else nn.Identity()
        self.encoder, self.upsample = nn.ModuleList(), nn.ModuleList()
        self.decoder = nn.ModuleList()
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
        self.to(device, memory_format=torch.channels_last)  # the layout that convolutions are quickest in

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self._check(x, t, label)
        if x.shape[0] == 0:  # pixel_unshuffle leaves an empty batch as it is
            return torch.empty_like(x)
        height, width = x.shape[-2:]
        blocks, patch = self.network["blocks"], self.network["patch"]
        x = pad(x, multiple=patch * 2 ** len(self.upsample))
        time = self.embed(t, label)
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

    def _check_larger(self, bottom: int) -> None:
        network = self.network
        widths, bottleneck = network["widths"], network["bottleneck"]
        if network["normalise"] and any(width % 8 for width in (*widths, bottom)):
            raise ValueError(f"widths {widths}, bottleneck {bottleneck}: must be multiples of 8 with "
                             "normalise=True")
        if network["attention"] and bottom % 32:
            raise ValueError(f"bottleneck of {bottom} channels: must be a multiple of 32 with attention")
        for name, value, least in (("blocks", network["blocks"], 1), ("patch", network["patch"], 1),
                                   ("attention", network["attention"], 0), ("bottleneck", bottom, 1)):
            if value < least:
                raise ValueError(f"{name} {value}: must be at least {least}")
        if not 0 <= network["dropout"] < 1:
            raise ValueError(f"dropout {network['dropout']}: must be in [0, 1)")


def default_arguments() -> dict:
    """The keyword-only arguments of both networks with their default values."""
    parameters = inspect.signature(LargerUnet.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
