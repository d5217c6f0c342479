"""`python -m polymodal.cli` is the `polymodal` command, as `torchrun -m polymodal.cli` starts it."""

import sys

from polymodal.cli import main

if __name__ == "__main__":
    sys.exit(main())
