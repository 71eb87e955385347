"""Fine-tune a segmenter on labeled images.

Commands:

    accelerate launch scripts/finetune.py --recipe small_finetune data.train=photos/train.json \\
        data.val=photos/val.json data.labels_per_class=10 model.init=runs/pretrain --output runs/finetune
    accelerate launch scripts/finetune.py --recipe my_recipe.yaml --resume
"""

import sys

from uplvp_hf.commands.finetune import main

if __name__ == "__main__":
    sys.exit(main())
