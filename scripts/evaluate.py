"""COCO mask AP of a model on a labeled dataset.

Commands:

    python scripts/evaluate.py runs/finetune data/animals --split val --output runs/finetune/evaluation
    python scripts/evaluate.py runs/finetune annotations.json --images images --class-agnostic
"""

import sys

from uplvp_hf.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
