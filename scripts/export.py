"""A trained model as ONNX, as a program of torch.export, or as transformers' own Mask2Former.

Commands:

    python scripts/export.py runs/finetune --output exported --format onnx --check
    python scripts/export.py runs/finetune --output exported-torch --format torch --size 512
    python scripts/export.py runs/finetune --output plain --format mask2former --check
"""

import sys

from uplvp_hf.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
