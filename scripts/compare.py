"""Learning curves and a table of several runs, mean and deviation over seeds.

Commands:

    python scripts/compare.py runs/scratch_seed0 runs/scratch_seed1 runs/pretrained_seed0 runs/pretrained_seed1
    python scripts/compare.py --arm 'ImageNet=runs/imagenet_*' --arm 'UPLVP=runs/uplvp_*' --output runs/figure3
"""

import sys

from uplvp_hf.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
