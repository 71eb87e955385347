"""Few-shot segmentation: train on base classes, draw supports, add classes, tables.

Commands:

    accelerate launch scripts/fewshot.py train --recipe fewshot/knet_coco2voc_prototype
    accelerate launch scripts/fewshot.py train --recipe fewshot/knet_coco2voc
    python scripts/fewshot.py draw few/ --shots 5 --seed 3 --output supports.json
    python scripts/fewshot.py add runs/fewshot/knet_coco2voc --supports supports.json --output runs/model
"""

import sys

from uplvp_hf.commands.fewshot import main

if __name__ == "__main__":
    sys.exit(main())
