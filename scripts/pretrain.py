"""Pre-train a segmenter on pseudo labels.

Commands:

    accelerate launch scripts/pretrain.py                       # the embedded default: generated scenes, no data needed
    accelerate launch scripts/pretrain.py --recipe small_pretrain data.train=runs/labels --output runs/pretrain
    accelerate launch --num_processes 8 scripts/pretrain.py --recipe my_recipe.yaml --resume
"""

import sys

from uplvp_hf.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
