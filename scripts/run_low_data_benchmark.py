"""Arms x seeds x segmenters with few labels: does pre-training pay? `uplvp benchmark` as a script.

Commands:

    python scripts/run_low_data_benchmark.py --recipe scenes_cpu --output runs/scenes --workers 2
    python scripts/run_low_data_benchmark.py --recipe animals7_cpu --data DATA --var weights=WEIGHTS --output runs/seven
"""

import sys

from uplvp_hf.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
