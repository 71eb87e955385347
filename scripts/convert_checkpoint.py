"""Convert a checkpoint of another code base into a folder that `from_pretrained` reads.

Commands:

    python scripts/convert_checkpoint.py knet_r50.pth models/knet
    python scripts/convert_checkpoint.py upmask2former_epoch_12.pth models/pretrained --kind pretraining
    python scripts/convert_checkpoint.py moco_v2_800ep.pth.tar models/moco
"""

import sys

from uplvp_hf.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
