"""Changing the classes of an ICPC model: their tokens, and the weights that are tied to them."""

import torch
from torch import nn

from .backbones import FeaturePyramid
from .configuration_icpc import IcpcConfig
from .errors import UserError
from .icpc_prompts import name_tokens
from .semantic_fpn import SemanticFpnHead
from .transfer import TransferReport, class_rows, transfer_weights

STRIDES = (4, 8, 16, 32)


class ClassLayers(nn.Module):
    """Pyramid and head, whose shapes follow the classes. channels: of the backbone's four maps; neck, head: layers that
    exist."""

    class_sized = ("head.classifier.weight", "head.classifier.bias")

    def __init__(
        self,
        config: IcpcConfig,
        channels: list[int],
        neck: FeaturePyramid | None = None,
        head: SemanticFpnHead | None = None,
    ):
        super().__init__()
        self.config = config
        scored = [
            count + config.num_labels * (stride in config.score_strides)
            for stride, count in zip(STRIDES, channels, strict=True)
        ]
        self.neck = FeaturePyramid(scored, config.fpn_channels) if neck is None else neck
        self.head = head or SemanticFpnHead(
            config.fpn_channels, config.head_channels, config.num_labels, config.head_dropout
        )

    @property
    def segmenter(self) -> "ClassLayers":
        """What names the layers that are sized by the classes: itself."""
        return self


def tokens_of_classes(
    config: IcpcConfig, id2label: dict[int, str], tokenizer=None, origin: str = ""
) -> list[list[int]]:
    """Tokens of these classes: the stored ones of names that the configuration knows, of the others by the tokenizer.

    Raises UserError for a tokenizer that disagrees with what is stored.
    """
    stored = dict(zip(config.id2label.values(), config.class_token_ids or [], strict=False))
    if tokenizer is None and not all(name in stored for name in id2label.values()):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(origin)
        except (OSError, ValueError) as error:
            new = next(name for name in id2label.values() if name not in stored)
            raise UserError(
                f"{origin} has no tokenizer, which the new class {new!r} needs: pass tokenizer=..."
            ) from error
    if tokenizer is None:
        return [stored[name] for name in id2label.values()]
    for name, ids in zip(stored, name_tokens(list(stored), tokenizer), strict=True):
        if ids != stored[name]:
            raise UserError(
                f"The tokenizer makes {ids} of the class {name!r}, but the model was trained with {stored[name]}: it "
                "belongs to another CLIP."
            )
    names = list(id2label.values())
    return [stored.get(name, ids) for name, ids in zip(names, name_tokens(names, tokenizer), strict=True)]


@torch.no_grad()
def transfer_by_class(source: nn.Module, target: nn.Module, class_head: str) -> TransferReport:
    """`transfer_weights`, and the columns of the pyramid's convolutions that read the score maps, by class name; those
    of classes that the source does not know start from the mean."""
    report = transfer_weights(source, target, class_head)
    rows = class_rows(source.config.id2label, target.config.id2label)
    for level, stride in enumerate(STRIDES):
        if stride not in source.config.score_strides or stride not in target.config.score_strides:
            continue
        old, new = source.neck.lateral[level].weight, target.neck.lateral[level].weight
        count = new.shape[1] - target.config.num_labels
        new[:, :count] = old[:, :count]
        new[:, count:] = old[:, count:].mean(1, keepdim=True)
        for index, row in rows.items():
            new[:, count + index] = old[:, count + row]
        label = f"neck.lateral.{level}.weight"
        if label in report.reinitialized:
            report.reinitialized.remove(label)
            report.remapped.append(label)
    return report
