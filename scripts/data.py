"""Check a dataset, convert it to COCO JSON, draw low-data splits.

Commands:

    python scripts/data.py check cityscapes --split train --images-too --json runs/cityscapes.json
    python scripts/data.py convert VOCdevkit/VOC2012 --split train --output runs/voc_train.json
    python scripts/data.py split cityscapes --split train --name 1@10 --output runs/cityscapes.1@10.json
"""

import sys

from uplvp_hf.commands.data import main

if __name__ == "__main__":
    sys.exit(main())
