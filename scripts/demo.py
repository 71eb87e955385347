"""The whole path on generated scenes, without data, weights or network; or the page of a model.

Commands:

    python scripts/demo.py --output runs/demo
    python scripts/demo.py --app runs/demo/model
"""

import sys

from uplvp_hf.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
