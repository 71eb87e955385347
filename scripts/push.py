"""Push a trained model with its card to the Hub, or write the folder that would be pushed.

Commands:

    python scripts/push.py runs/finetune --repo-id USER/NAME --dry-run --output repository
    python scripts/push.py runs/finetune --repo-id USER/NAME --private
"""

import sys

from uplvp_hf.commands.push import main

if __name__ == "__main__":
    sys.exit(main())
