"""Padding of a batch, kept out of convolutions, pooling, norms and resizing.

Images of different sizes share one canvas: each stands in its upper left corner, the rest is padding. A convolution
alone cannot tell padding from image after its first layer, because biases and norms fill the padding with values.
With the functions here an image alone (on a canvas of its size rounded up to the backbone's largest stride) has the
same features as inside a larger padded batch.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_SQUEEZES = ("conv_reduce", "fc1")  # first layer of timm's squeeze-and-excite blocks, after their mean over the map


def valid_cells(pixel_mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W) mask with 1 on the image -> (B, h, w) bool, True on cells that hold any part of the image."""
    return F.adaptive_max_pool2d(pixel_mask[:, None].float(), tuple(size))[:, 0] > 0


def is_padded(pixel_mask: Tensor | None) -> bool:
    """False when there is certainly no padding. On accelerators the mask is not read (it would wait for the device),
    so any mask counts as padding there."""
    if pixel_mask is None:
        return False
    return torch.compiler.is_compiling() or pixel_mask.device.type != "cpu" or not bool(pixel_mask.all())


def image_extent(pixel_mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Width and height of every image as shares of the padded input: (B, 2), ones without a pixel mask."""
    if pixel_mask is None:
        return torch.ones((batch, 2), device=device)
    real = pixel_mask.to(device).bool()
    height, width = real[:, :, 0].float().mean(1), real[:, 0].float().mean(1)
    return torch.stack([width, height], dim=1)


def extend_edges(x: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Repeats the last row and column of every image outwards over its padding: (B, C, h, w) -> the same shape.

    As bilinear interpolation does beyond the end of a map. `pixel_mask` (B, H, W); None leaves `x` as it is.
    """
    if not is_padded(pixel_mask):
        return x
    height, width = x.shape[-2:]
    valid = valid_cells(pixel_mask, (height, width)).to(x.device)
    last_row = valid.any(2).sum(1, keepdim=True).clamp(min=1) - 1
    last_column = valid.any(1).sum(1, keepdim=True).clamp(min=1) - 1
    row = torch.arange(height, device=x.device).minimum(last_row)  # (B, h)
    column = torch.arange(width, device=x.device).minimum(last_column)
    cell = (row[:, :, None] * width + column[:, None, :]).flatten(1)
    return x.flatten(2).gather(2, cell[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def upsample(x: Tensor, size: tuple[int, int], pixel_mask: Tensor | None = None) -> Tensor:
    """Bilinear resizing (`align_corners=False`) whose values on an image do not depend on the canvas around it.

    x (B, C, h, w), pixel_mask (B, H, W) or None -> (B, C, *size).
    """
    return F.interpolate(extend_edges(x, pixel_mask), size=tuple(size), mode="bilinear", align_corners=False)


@contextmanager
def padding_masked(module: nn.Module, pixel_mask: Tensor | None) -> Iterator[None]:
    """While active, the layers inside `module` treat each image as if it ended where its mask ends.

    pixel_mask (B, H, W), 1 on the image, H and W multiples of the largest stride; a map of (h, w) cells has
    ceil(size * h / H) cells of an image. Inputs of `Conv2d` and `ConvTranspose2d` (kernels larger than 1) and of
    pooling are zeroed outside (lowest for maxima), averages that do not count padding count the image's cells,
    `GroupNorm` takes its statistics over them, and so do adaptive average pooling to one cell and timm's
    squeeze-and-excite. What stands on the padding afterwards has no meaning. Without padding nothing changes, bit for
    bit.

    Not covered: `BatchNorm` in training mode (its statistics are over the whole canvas; backbones here are trained
    with them fixed or accept it), windows and global attention, and functional calls that mix cells. Layers
    checkpointed through transformers are recomputed under the same masks. May be nested; other threads that use the
    module meanwhile are left alone. ValueError when a layer gets a map with another number of images.
    """
    if not is_padded(pixel_mask):
        yield
        return
    masking = _Masking(pixel_mask)
    handles, replaced = [], []
    try:
        for layer in module.modules():
            handles.extend(masking.attach(layer))
            checkpoint = layer.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None:
                replaced.append((layer, checkpoint))
                layer._gradient_checkpointing_func = masking.checkpointed(checkpoint, module)
        yield
    finally:
        masking.open = False
        for handle in handles:
            handle.remove()
        for layer, checkpoint in replaced:
            layer._gradient_checkpointing_func = checkpoint


class _Masking:
    """Hooks of one `padding_masked` block, and the masks at the sizes met so far."""

    def __init__(self, pixel_mask: Tensor):
        self.pixel_mask = pixel_mask
        self.thread = threading.get_ident()
        self.open = True
        self.sizes: dict[tuple, Tensor] = {}
        self.full = pixel_mask.flatten(1).bool().all(1)[:, None, None, None]

    def attach(self, layer: nn.Module) -> list:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            return [layer.register_forward_pre_hook(self.clear)] if max(layer.kernel_size) > 1 else []
        if isinstance(layer, nn.GroupNorm):
            return [layer.register_forward_hook(self.renorm)]
        if isinstance(layer, _POOLS):
            return [layer.register_forward_pre_hook(self.clear), layer.register_forward_hook(self.repool)]
        first = [getattr(layer, name) for name in _SQUEEZES if isinstance(getattr(layer, name, None), nn.Conv2d)]
        if first and hasattr(layer, "gate"):
            return self.attach_squeeze(layer, first[0])
        return []

    def attach_squeeze(self, block: nn.Module, first: nn.Module) -> list:
        """Turns the mean over the canvas that enters `first` into one over the image."""
        share: list[Tensor] = []

        def clear(block, inputs):
            if not self.mine():
                return None
            share[:] = [self.share(inputs[0])]
            return self.clear(block, inputs)

        def rescale(first, inputs):
            return ((inputs[0].float() / share[0]).to(inputs[0].dtype),) if self.mine() and share else None

        return [block.register_forward_pre_hook(clear), first.register_forward_pre_hook(rescale)]

    def mine(self) -> bool:
        return threading.get_ident() == self.thread

    def valid(self, x: Tensor) -> Tensor:
        """(B, 1, h, w) bool for a map (B, C, h, w)."""
        size = tuple(x.shape[-2:])
        if x.shape[0] != self.pixel_mask.shape[0]:
            raise UserError(
                f"A layer got {x.shape[0]} maps, but the pixel mask has {self.pixel_mask.shape[0]} images: run it "
                "outside of padding_masked."
            )
        if size not in self.sizes:
            self.sizes[size] = valid_cells(self.pixel_mask, size)[:, None].to(x.device)
        return self.sizes[size]

    def share(self, x: Tensor) -> Tensor:
        """Share of the map's cells that each image has, (B, 1, 1, 1)."""
        return self.valid(x).float().mean((2, 3), keepdim=True).clamp(min=1e-12)

    def clear(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.mine():
            return None
        x = inputs[0]
        maximum = isinstance(layer, nn.MaxPool2d | nn.AdaptiveMaxPool2d)
        return (x.masked_fill(~self.valid(x), torch.finfo(x.dtype).min if maximum else 0.0), *inputs[1:])

    def repool(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.mine():
            return None
        if isinstance(layer, nn.MaxPool2d):  # the lowest number would overflow in what follows
            if isinstance(output, tuple):  # return_indices
                return (output[0].masked_fill(~self.valid(output[0]), 0.0), *output[1:])
            return output.masked_fill(~self.valid(output), 0.0)
        if isinstance(layer, nn.AvgPool2d) and not layer.count_include_pad:
            counted = layer.forward(self.valid(inputs[0]).float())
            return (output.float() / counted.clamp(min=1e-12)).to(output.dtype)
        if isinstance(layer, nn.AdaptiveAvgPool2d) and output.shape[-2:] == (1, 1):
            return (output.float() / self.share(inputs[0])).to(output.dtype)
        return None

    def renorm(self, norm: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Group norm with statistics over the image; the images that fill the canvas keep torch's own result."""
        if not self.mine():
            return None
        x, valid = inputs[0], self.valid(inputs[0])
        with torch.autocast(x.device.type, enabled=False):
            groups = (x.shape[0], norm.num_groups, -1, *x.shape[-2:])
            values, inside = x.float().reshape(groups), valid[:, :, None]
            count = inside.sum((2, 3, 4), keepdim=True).clamp(min=1) * (x.shape[1] // norm.num_groups)
            mean = values.masked_fill(~inside, 0.0).sum((2, 3, 4), keepdim=True) / count
            centered = (values - mean).masked_fill(~inside, 0.0)
            variance = centered.square().sum((2, 3, 4), keepdim=True) / count
            normed = (centered * (variance + norm.eps).rsqrt()).view(x.shape)
            if norm.affine:
                normed = normed * norm.weight.float()[:, None, None] + norm.bias.float()[:, None, None]
        normed = normed.to(output.dtype)
        for name in ("drop", "act"):  # timm's norms with an activation of their own
            after = getattr(norm, name, None)
            normed = after(normed) if isinstance(after, nn.Module) else normed
        return torch.where(self.full.to(x.device), output, normed)

    def checkpointed(self, checkpoint: Callable, module: nn.Module) -> Callable:
        """`checkpoint` whose recomputation, after the block has ended, masks again."""

        def call(function: Callable, *args, **kwargs):
            def masked(*inner, **options):
                if self.open and self.mine():
                    return function(*inner, **options)
                with padding_masked(module, self.pixel_mask):
                    return function(*inner, **options)

            return checkpoint(masked, *args, **kwargs)

        return call
