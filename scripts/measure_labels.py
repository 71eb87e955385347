"""How good pseudo labels are, against true ones: recall, precision, mean best IoU and mask AP (0 to 1), with and
without classes.

Commands:

    python scripts/measure_labels.py photos --split train runs/labels
    python scripts/measure_labels.py photos/annotations/train.json runs/labels runs/other_labels
"""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", help="labeled images: COCO JSON, or a folder with images/ and annotations/")
    parser.add_argument("labels", nargs="+", help="pseudo-label stores of the same images")
    parser.add_argument("--split", help="annotations/SPLIT.json of the folder")
    arguments = parser.parse_intermixed_args(argv)

    from uplvp_hf.data import load_dataset_rows
    from uplvp_hf.labeling import proposal_quality

    try:
        truth = load_dataset_rows(arguments.truth, split=arguments.split)
        for folder in arguments.labels:
            quality = proposal_quality(load_dataset_rows(folder), truth, average_precision=True)
            print(f"{folder}: {quality['proposals']} masks on {quality['images']} images")
            for title, suffix in (("whatever the class", ""), ("right class", "_named")):
                keys = ("mean_best_iou", "recall", "precision", "ap", "ap50")
                line = "mean best IoU {:.3f}  recall@.5 {:.3f}  precision@.5 {:.3f}  AP {:.3f}  AP50 {:.3f}"
                print(f"  {title:18}  " + line.format(*(quality[key + suffix] for key in keys)))
            print(f"  class accuracy of the masks that cover an instance: {quality['class_accuracy']:.3f}")
    except (ValueError, OSError) as error:
        print(f"measure_labels: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
