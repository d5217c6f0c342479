"""EfficientNet-Lite0 as a vision encoder: images to a small grid of feature tokens.

The network is EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1) in its "lite" variant (TensorFlow TPU
models, efficientnet/lite): no squeeze-and-excitation, ReLU6 in the place of swish, and a stem and a head that the
scaling rules leave alone. It is small enough (4.7 M parameters, 0.4 GFLOP) that a laptop CPU encodes dozens of
images a second, which is why the default model uses it.

Padding follows TensorFlow's SAME rule, which is asymmetric for even sizes and stride 2: the extra row and column
go to the bottom and to the right. The trained weights need it; symmetric padding shifts every feature map.

Preprocessing the weights were trained with: RGB, 224 x 224, bicubic, (pixel - 127) / 128 on 0..255 values, that
is mean 127/255 and std 128/255 after scaling to 0..1 (`PIXEL_MEAN`, `PIXEL_STD`).

Differences from the reference: batch normalisation is always in inference mode (the tower is frozen in every recipe
that has used it, and running statistics must not drift with our batches); any image size works because the padding
is computed per call; several depths are returned, because the last map has lost most of colour and position.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.errors import PolymodalError
from polymodal.media_plan import Size
from polymodal.utils.files import shipped_folder
from polymodal.utils.modules import frozen
from polymodal.utils.safetensors_io import compare_tensors, read_tensors, write_tensors

PIXEL_MEAN: tuple[float, float, float] = (127 / 255, 127 / 255, 127 / 255)
PIXEL_STD: tuple[float, float, float] = (128 / 255, 128 / 255, 128 / 255)
IMAGE_SIZE = Size(224, 224)
WEIGHTS_FILE = "efficientnet_lite0.safetensors"
CLASSES_FILE = "classes.txt"
NUM_CLASSES = 1000
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
# Both reference implementations use 1e-3, not torch's default of 1e-5.
BATCH_NORM_EPS = 1e-3


class StageSpec(NamedTuple):
    """One row of table 1 of the paper: a run of blocks with the same width."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES: tuple[StageSpec, ...] = (
    StageSpec(1, 3, 1, 1, 16),
    StageSpec(2, 3, 2, 6, 24),
    StageSpec(2, 5, 2, 6, 40),
    StageSpec(3, 3, 2, 6, 80),
    StageSpec(3, 5, 1, 6, 112),
    StageSpec(4, 5, 2, 6, 192),
    StageSpec(1, 3, 1, 6, 320),
)

# Name -> (index into STAGES after which the map is taken, channels); "head" is after the last 1x1 convolution.
FEATURES: dict[str, tuple[int, int]] = {
    "stride4": (1, 24),
    "stride8": (2, 40),
    "stride16": (4, 112),
    "stride32": (6, 320),
    "head": (7, HEAD_CHANNELS),
}
SHALLOW = ("stride4", "stride8", "stride16")


class SameConv2d(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow's SAME: output size = ceil(input size / stride)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> None:
        # With stride 1 and an odd kernel SAME is even on all sides, which the convolution does without a copy.
        even = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=bias, padding=even)

    def forward(self, input: Tensor) -> Tensor:
        """Pad, then convolve."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            rows, columns = (_same_padding(size, kernel, stride) for size in input.shape[-2:])
            input = F.pad(input, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(input)


def _same_padding(size: int, kernel: int, stride: int) -> int:
    """Total padding along one side so that the output has ceil(size / stride) positions."""
    outputs = -(-size // stride)
    return max((outputs - 1) * stride + kernel - size, 0)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics, as four buffers; nothing in it can drift while we train."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the stored statistics."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=BATCH_NORM_EPS
        )


def fold_norms(module: nn.Module) -> nn.Module:
    """A copy whose normalisations are part of the convolutions before them: the same numbers, half the time."""
    folded = copy.deepcopy(module)
    for unit in [part for part in folded.modules() if isinstance(part, nn.Sequential)]:
        if len(unit) > 1 and isinstance(conv := unit[0], SameConv2d) and isinstance(norm := unit[1], FrozenBatchNorm2d):
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            one = SameConv2d(conv.in_channels, conv.out_channels, kernel, stride, conv.groups, bias=True)
            scale = norm.weight / torch.sqrt(norm.running_var + BATCH_NORM_EPS)
            weight = conv.weight * scale[:, None, None, None]
            one.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
            one.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
            unit[0], unit[1] = one, nn.Identity()
            if len(unit) > 2:
                unit[2] = nn.ReLU6(inplace=True)
    return folded.requires_grad_(False)


class InvertedResidual(nn.Module):
    """MobileNet-v2's block: widen with a 1x1, filter per channel, narrow with a 1x1, add the input if it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.expand: nn.Module = nn.Identity()
        if expand != 1:
            self.expand = nn.Sequential(SameConv2d(inputs, hidden, 1), FrozenBatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            SameConv2d(hidden, hidden, kernel, stride, groups=hidden), FrozenBatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(SameConv2d(hidden, outputs, 1), FrozenBatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to [N, C, H, W]."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The whole classifier, with every depth of it readable."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(SameConv2d(3, STEM_CHANNELS, 3, 2), FrozenBatchNorm2d(STEM_CHANNELS), nn.ReLU6())
        self.stages = nn.ModuleList()
        inputs = STEM_CHANNELS
        for spec in STAGES:
            blocks = []
            for number in range(spec.blocks):
                stride = spec.stride if number == 0 else 1
                blocks.append(InvertedResidual(inputs, spec.channels, spec.kernel, stride, spec.expand))
                inputs = spec.channels
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Sequential(SameConv2d(inputs, HEAD_CHANNELS, 1), FrozenBatchNorm2d(HEAD_CHANNELS), nn.ReLU6())
        self.classifier = nn.Linear(HEAD_CHANNELS, NUM_CLASSES)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:  # [N, 3, H, W]
        """Run the convolutions."""
        wanted = {index: name for name, (index, _) in FEATURES.items()}
        maps: dict[str, Tensor] = {}
        x = self.stem(pixels)
        for index, stage in enumerate((*self.stages, self.head)):
            x = stage(x)
            if index in wanted:
                maps[wanted[index]] = x
        return maps

    def logits(self, head: Tensor) -> Tensor:  # -> [N, 1000]
        """The 1,000 ImageNet scores."""
        scores: Tensor = self.classifier(head.mean(dim=(2, 3)))
        return scores


class ClassHead(NamedTuple):
    """A classifier that a tower was trained with: what its features mean, in words."""

    channels: slice  # Which of the encoder's channels it reads
    weight: Tensor  # [K, channels]
    bias: Tensor  # [K]
    names: tuple[str, ...]  # The K classes


class EfficientNetEncoder(nn.Module):
    """A `VisionEncoder`: pixels [N, 3, H, W] to tokens [N, P, E] on a pooled grid, row by row."""

    # Each chosen depth is average-pooled to the same grid, then all are put side by side along E: the deep map says
    # what it is, the shallow ones keep colour, edges and place. The depths differ tenfold in size, so a projector
    # should normalise per channel before it mixes them. With `detail` above 1 the shallow maps (stride 16 and finer)
    # keep that many cells a side inside each token, laid along the channels (space to depth): letters and small
    # things stay apart without one more token.

    def __init__(
        self,
        network: EfficientNetLite0 | None = None,
        stages: tuple[str, ...] = ("stride8", "stride16", "head"),
        pool: int = 4,
        detail: int = 1,
    ) -> None:
        super().__init__()
        unknown = [name for name in stages if name not in FEATURES]
        if unknown or not stages or len(set(stages)) != len(stages):
            raise PolymodalError(
                f"encoder stages {list(stages)}: choose one or more different names out of {', '.join(FEATURES)}"
            )
        if pool < 1:
            raise PolymodalError(f"encoder pool is {pool}; it is the side of the token grid and must be 1 or more")
        if detail < 1:
            raise PolymodalError(f"encoder detail is {detail}; it is the cells a side in each token, 1 or more")
        self.network = network if network is not None else EfficientNetLite0()
        self.stages = tuple(stages)
        self.grid = Size(pool, pool)
        self.tile = IMAGE_SIZE
        self.cells = {name: detail if name in SHALLOW else 1 for name in stages}
        self.embed_dim = self._channels(stages)

    def class_head(self) -> ClassHead | None:
        """The ImageNet classifier as seen from this encoder's channels; None where the head map is not among them."""
        if "head" not in self.stages:
            return None
        start = self._channels(self.stages[: self.stages.index("head")])
        names = (shipped_folder() / "efficientnet_lite0" / CLASSES_FILE).read_text(encoding="utf-8").splitlines()
        weight, bias = self.network.classifier.weight.detach(), self.network.classifier.bias.detach()
        return ClassHead(slice(start, start + HEAD_CHANNELS), weight, bias, tuple(names))

    def _channels(self, stages: Sequence[str]) -> int:
        return sum(FEATURES[name][1] * self.cells[name] ** 2 for name in stages)

    def save(self, folder: Path) -> None:
        """Write the tower's weights, as they are, into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_efficientnet_lite0(self.network, folder / WEIGHTS_FILE, torch.float32)

    def forward(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W]
        """Encode images."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        weight = self.network.classifier.weight
        network: nn.Module = self.network
        if frozen(self.network):
            # Beside the modules, since it is no weight of its own; remade where weights were moved, cast or loaded.
            key, known = (weight.device, weight.dtype, weight.data_ptr(), weight._version), self.__dict__.get("_folded")
            if known is None or known[0] != key:
                known = self.__dict__["_folded"] = (key, fold_norms(self.network))
            network = known[1]
        maps = network(pixels.to(weight.dtype))
        pooled = []
        for name, cells in self.cells.items():
            fine = F.adaptive_avg_pool2d(maps[name], (self.grid.height * cells, self.grid.width * cells))
            pooled.append(F.pixel_unshuffle(fine, cells))
        return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)


def convert_efficientnet_lite0(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the published PyTorch weights to ours."""
    names = {"_fc.weight": "classifier.weight", "_fc.bias": "classifier.bias"}
    names |= _unit("_conv_stem", "_bn0", "stem") | _unit("_conv_head", "_bn1", "head")
    number = 0
    for stage, spec in enumerate(STAGES):
        for block in range(spec.blocks):
            theirs, ours = f"_blocks.{number}.", f"stages.{stage}.{block}."
            if spec.expand != 1:
                names |= _unit(theirs + "_expand_conv", theirs + "_bn0", ours + "expand")
            names |= _unit(theirs + "_depthwise_conv", theirs + "_bn1", ours + "depthwise")
            names |= _unit(theirs + "_project_conv", theirs + "_bn2", ours + "project")
            number += 1
    found = {key: tensor for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}
    compare_tensors(dict.fromkeys(names, ()), dict.fromkeys(found, ()), "not EfficientNet-Lite0 weights")
    converted = {ours: found[theirs].contiguous() for theirs, ours in names.items()}
    compare_tensors(_empty().state_dict(), converted, "the weights to convert")
    return converted


def _unit(conv: str, norm: str, ours: str) -> dict[str, str]:
    """The five names of one convolution and its normalisation."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{conv}.weight": f"{ours}.0.weight"} | {f"{norm}.{part}": f"{ours}.1.{part}" for part in parts}


def _empty() -> EfficientNetLite0:
    """The network without data."""
    with torch.device("meta"):
        return EfficientNetLite0()


def load_efficientnet_lite0(weights: Path) -> EfficientNetLite0:
    """Build the network from a safetensors file with our names."""
    tensors = read_tensors(weights)
    network = _empty()
    compare_tensors(network.state_dict(), tensors, weights)
    network.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    # Depthwise convolutions are about a quarter faster with channels last, on a CPU and on a GPU.
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)


def save_efficientnet_lite0(network: EfficientNetLite0, weights: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the network as a safetensors file that `load_efficientnet_lite0` reads."""
    write_tensors(weights, network.state_dict(), dtype)
