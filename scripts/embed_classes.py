"""Text embeddings of class names, written to a file: for labeling without a text tower (`uplvp label
networks.text_embeddings=FILE`) and for the text class head of pre-training (`uplvp pretrain model.text_features=FILE`).

Commands:

    python scripts/embed_classes.py names.txt --clip openai/clip-vit-base-patch16 --output names.safetensors
    python scripts/embed_classes.py bear,deer,otter --clip openai/clip-vit-base-patch16 --template openai80 \
        --output animals.safetensors
"""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", help="file with one class a line (synonyms after commas), or bear,deer,otter")
    parser.add_argument("--clip", required=True, help="CLIP or SigLIP model: folder or hub id")
    parser.add_argument("--output", required=True, help="safetensors file")
    parser.add_argument(
        "--template",
        action="append",
        help="prompt such as 'a photo of a {}', or bare, openai7, openai80; repeatable (default: openai7)",
    )
    arguments = parser.parse_intermixed_args(argv)

    from uplvp_hf.labeling import load_clip, read_vocabulary
    from uplvp_hf.labeling.encoders.prompt_templates import TEMPLATES
    from uplvp_hf.labeling.encoders.text import embed_classes, save_text_embeddings

    try:
        entries = read_vocabulary(arguments.vocabulary)
        clip = load_clip(arguments.clip)
        given = arguments.template or TEMPLATES
        templates = given[0] if len(given) == 1 else given  # one may name a list
        text = embed_classes(clip.model, clip.tokenizer, entries, templates)
        save_text_embeddings(arguments.output, text, encoder=arguments.clip)
    except (ValueError, OSError) as error:
        print(f"embed_classes: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {len(text.names)} names, {text.vectors.shape[1]} channels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
