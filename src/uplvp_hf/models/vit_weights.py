"""Weights of a self-supervised ViT for a segmenter that is one: names, positions and patches of another size."""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError


def resized_table(table: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Position embeddings (h * w, D) of one grid for another one: bicubic with antialiasing, as DINOv2 has them."""
    if before == after:
        return table
    maps = table.float().T.unflatten(1, before)[None]
    maps = F.interpolate(maps, size=after, mode="bicubic", align_corners=False, antialias=True)
    return maps[0].flatten(1).T.to(table.dtype)


def resized_patches(kernel: Tensor, side: int) -> Tensor:
    """A patch embedding (D, 3, p, p) for patches of `side` pixels that sees in an enlarged patch what it saw in the
    patch: the pseudo-inverse of resizing (FlexiViT, arXiv 2212.08013, section 3.4)."""
    before = kernel.shape[-1]
    if before == side:
        return kernel
    basis = torch.eye(before * before, dtype=torch.float64, device=kernel.device).view(-1, 1, before, before)
    resize = F.interpolate(basis, size=(side, side), mode="bicubic", align_corners=False, antialias=side < before)
    inverse = torch.linalg.pinv(resize.flatten(1))  # (side * side, before * before)
    return (kernel.double().flatten(2) @ inverse.T).unflatten(2, (side, side)).to(kernel.dtype)


def encoder_tensors(source: nn.Module, own: dict[str, Tensor]) -> list[str]:
    """Copies a DINOv2's or DINOv3's tensors into `own`, those of an EoMT by name. See `EomtSegmenter.load_encoder`."""
    found = {_name(name, own): value for name, value in source.state_dict().items()}
    table = found.pop("embeddings.position_embeddings", None)
    if table is not None and "embeddings.position_embeddings.weight" in own:  # (1, 1 + h * w, D)
        # EoMT has no position for the class token: it goes into the token itself.
        found["embeddings.cls_token"] = found["embeddings.cls_token"] + table[:, :1]
        sides = [round(len(one) ** 0.5) for one in (table[0, 1:], own["embeddings.position_embeddings.weight"])]
        grids = [(side, side) for side in sides]
        found["embeddings.position_embeddings.weight"] = resized_table(table[0, 1:], *grids)
    for name in own:
        if re.search(r"patch_embeddings(\.projection)?\.weight$", name) and name in found:
            found[name] = resized_patches(found[name], own[name].shape[-1])
    return copy_tensors(found, own, source, "Number and width of the blocks, heads and register tokens must agree.")


@torch.no_grad()
def copy_tensors(found: dict[str, Tensor], own: dict[str, Tensor], source: nn.Module, remedy: str) -> list[str]:
    """Copies the tensors of a source, `found`, into those of a model, `own`; returns the names of what is left over.

    Raises UserError, with the remedy, where one is missing or has another shape.
    """
    unlike = [name for name, value in own.items() if name not in found or found[name].shape != value.shape]
    if unlike:
        raise UserError(
            f"The weights of a {type(source).__name__} do not fit: {len(unlike)} tensors are missing or of another "
            f"shape, for example `{unlike[0]}`. {remedy}"
        )
    for name, value in own.items():
        value.copy_(found[name])
    return sorted(found.keys() - own.keys())


def freeze_mask_token(backbone: nn.Module) -> None:
    """The token that stood for hidden patches in the ViT's own pre-training: nothing else uses it, so it would never
    get a gradient."""
    for name, parameter in backbone.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)


def _name(name: str, own: dict[str, Tensor]) -> str:
    """EoMT's name of a tensor of transformers' `Dinov2Model`, `Dinov2WithRegistersModel` or `DINOv3ViTModel`."""
    name = re.sub(r"^(?:encoder\.|model\.)?layer\.", "layers.", name)
    name = re.sub(r"^norm\.", "layernorm.", name)
    moved = name.replace("attention.o_proj", "attention.out_proj")
    return moved if moved in own else name
