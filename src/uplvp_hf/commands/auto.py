"""`uplvp auto`: from images and a few labels to a model, deciding what pays on the way.

    uplvp auto photos/ --labels few.json
    uplvp auto photos/ --labels few.json --vocabulary "bear,deer,otter" --clip openai/clip-vit-base-patch16
    uplvp auto photos/ --labels few.json --val more.json finetune.optim.steps=300

It checks the data, tries the mask sources that can run here on the labeled images, takes the best or none, says how
long the rest will take, labels, pre-trains, fine-tunes with and without, and leaves the better model with a page about
all of it. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse

from ._terminal import AGAIN, add_verbosity, check_device, verb


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uplvp auto", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", help="folder or list of images, with or without the labeled ones")
    add("--labels", metavar="FILE", required=True, help="a few labeled images: COCO JSON, or what training reads")
    add("--label-images", metavar="DIR", help="folder of their images (default: beside the file, else IMAGES)")
    add("--val", metavar="FILE", help="labeled images to measure on (default: a quarter of the labels is held out)")
    add("--val-images", metavar="DIR", help="folder of their images")
    add("--output", metavar="DIR", default="runs/auto", help="everything is written there (default: runs/auto)")
    sources = parser.add_argument_group("mask sources", "what is named here is tried beside the others")
    sources.add_argument("--vocabulary", help="class names with synonyms, for --clip (default: those of the labels)")
    sources.add_argument("--clip", help="CLIP, SigLIP or SigLIP 2: folder or hub id")
    sources.add_argument("--examples", metavar="FILE", help="labeled images that name masks (default: the labels)")
    sources.add_argument("--backbone", help="network that proposes and compares masks, as of `uplvp label`")
    sources.add_argument("--backbone-weights", metavar="FILE", help="safetensors of timm's mobilenetv2_100")
    sources.add_argument("--pad-type", help="same: these weights were trained with TensorFlow's padding")
    sources.add_argument("--model", help="a SAM of transformers: folder or hub id")
    sources.add_argument("--masks", metavar="FILE", help="masks that another program made")
    sources.add_argument("--sources", nargs="+", default=[], metavar="NAME", help="try only these, such as foreground")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--start", help="small, swin_tiny, swin_base or swin_large (default: the strongest that fits)"
    )
    training.add_argument("--recipes", nargs=2, metavar=("PRETRAIN", "FINETUNE"), help="in place of the start's own")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    add(
        "words",
        nargs="*",
        metavar="section.key=value",
        help="settings of training, behind settings., pretrain. or finetune.: finetune.optim.steps=200",
    )
    add_verbosity(parser)
    return parser


def _auto(arguments: argparse.Namespace) -> None:
    from uplvp_hf.auto.request import Request
    from uplvp_hf.auto.run import run_auto

    check_device(arguments.device)
    given = {key: value for key, value in vars(arguments).items() if key in Request.__dataclass_fields__}
    sources = [name for name in arguments.sources if "=" not in name]  # it also takes the settings behind it
    given |= {
        "sources": tuple(sources),
        "words": (*arguments.words, *(name for name in arguments.sources if "=" in name)),
    }
    given["recipes"] = arguments.recipes and tuple(arguments.recipes)
    request = Request(**given)
    run_auto(request, arguments.output, not arguments.quiet)
    print(f"Model: {arguments.output}/model  Page: {arguments.output}/report.html")


main = verb("auto", make_parser, _auto, AGAIN)
