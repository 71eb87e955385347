"""Instances in images, as COCO JSON and as overlays.

Commands:

    python scripts/predict.py runs/finetune images/ --output predictions --threshold 0.5
    python scripts/predict.py runs/finetune one.jpg 'shots/**/*.png' https://example.org/two.jpg --output predictions
    python scripts/predict.py runs/finetune aerial.tif --output predictions --tiles 1024 --overlap 0.25
"""

import sys

from uplvp_hf.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
