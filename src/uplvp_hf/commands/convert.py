"""`uplvp convert`: a checkpoint of another code base -> a folder that `from_pretrained` reads."""

from __future__ import annotations

import argparse
import sys

from ..models.errors import UserError
from ._terminal import verb


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp convert",
        description="Convert a checkpoint of K-Net, QueryInst or Mask2Former (mmdetection, detectron2), of UPLVP's "
        "pre-training, a DenseCLIP, a CLIP (OpenAI, OpenCLIP, transformers, timm's ResNets), or a ResNet (torchvision, "
        "MoCo, DenseCL, SwAV). The kind is told from its names.",
    )
    add = parser.add_argument
    add(
        "checkpoint",
        help="safetensors, a file of torch.save that holds plain weights, a TorchScript archive, or a folder of "
        "transformers' CLIP",
    )
    add("output", help="new folder")
    add(
        "--kind",
        choices=("instance", "pretraining", "segmenter"),
        default="instance",
        help="a UPLVP model to fine-tune or predict with (default), one to go on pre-training, or the network alone",
    )
    add("--config", metavar="JSON", help="the original's configuration; without it sizes are read off the tensors")
    add("--classes", metavar="FILE", help="class names, one a line, or bear,deer,otter (default: COCO's for 80)")
    add("--set", metavar="NAME=VALUE", action="append", default=[], help="a setting of the segmenter; repeatable")
    add(
        "--tokenizer",
        metavar="NAME",
        help="of class names, for CLIPs: folder or repository (default: OpenAI's)",
    )
    add("--verbose", action="store_true", help="also every tensor, and where in the code an error arose")
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    import yaml

    from ..conversion.convert import convert_checkpoint

    settings = {}
    for pair in arguments.set:
        name, found, value = pair.partition("=")
        if not found:
            raise UserError(f"--set {pair}: write NAME=VALUE")
        settings[name] = yaml.safe_load(value)
    classes = None
    if arguments.classes is not None:
        from ..labeling.encoders.text import read_vocabulary, split_synonyms

        classes = [split_synonyms(entry)[0] for entry in read_vocabulary(arguments.classes)]
    report = convert_checkpoint(
        arguments.checkpoint,
        arguments.output,
        arguments.kind,
        arguments.config,
        classes,
        settings=settings,
        tokenizer=arguments.tokenizer,
    )
    if arguments.verbose:
        for title, lines in (
            ("kept", report.kept),
            ("renamed", [f"{old} -> {', '.join(new)}" for old, new in report.renamed.items()]),
            ("dropped", [f"{name}: {reason}" for name, reason in report.dropped.items()]),
            ("missing", [f"{name}: {reason}" for name, reason in report.missing.items()]),
        ):
            print("\n".join(f"{title:8} {line}" for line in lines))
    print(report)
    if report.untrained:
        first = ", ".join(report.untrained[:3])
        print(f"uplvp convert: {len(report.untrained)} tensors are not in the file: {first}", file=sys.stderr)
    print(f"{arguments.output}: every tensor is in conversion_report.json")


main = verb("convert", make_parser, _convert)
