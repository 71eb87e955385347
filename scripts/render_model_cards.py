"""Renders the cards of the models that are meant to be published, from one template and the tables beside it.

Commands:

    python scripts/render_model_cards.py            # writes model_cards/*.md
    python scripts/render_model_cards.py --check    # exit code 1 if a card there is not what would be written
"""

import argparse
import sys
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).resolve().parents[1] / "model_cards"


def render(folder: Path = FOLDER) -> dict[str, str]:
    """Name of every card to its text. A figure or a field that is missing is an error."""
    models, published = (
        yaml.safe_load((folder / name).read_text(encoding="utf-8")) for name in ("models.yaml", "published.yaml")
    )
    environment = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.get_template("template.md.j2")
    cards = {}
    for key, segmenter in models.items():
        for pretrained in (False, True):
            name = f"{key}-coco" + ("-pretrained" if pretrained else "")
            data = ModelCardData(
                library_name="transformers",
                pipeline_tag="image-segmentation",
                license="apache-2.0",
                tags=["instance-segmentation", "uplvp", key, "vision", "custom_code"],
            )
            cards[name] = template.render(
                data=data,
                name=name,
                pretrained=pretrained,
                segmenter=segmenter,
                recipes={
                    "pretrain": f"paper/{segmenter['recipe']}_pretrain",
                    "finetune": f"paper/{segmenter['recipe']}_coco_full_uplvp_finetune",
                },
                published={**published[key], "source": published["source"]},
            )
    return cards


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a card differs")
    check = parser.parse_args().check
    differing = []
    for name, text in render().items():
        file = FOLDER / f"{name}.md"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            differing.append(file.name)
            if not check:
                file.write_text(text, encoding="utf-8")
    print(f"{'Differing' if check else 'Written'}: {', '.join(differing) or 'none'}.")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
