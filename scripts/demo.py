"""The whole path on generated scenes, without data, weights or network.

Commands:

    python scripts/demo.py --output runs/demo
"""

import sys

from uplvp_hf.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
