"""``python -m hbp``, which is what torchrun starts: ``torchrun --nproc-per-node 8 -m hbp train config.yaml``."""

import sys

from hbp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
