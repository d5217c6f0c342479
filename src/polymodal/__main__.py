"""`python -m polymodal` is the `polymodal` command."""

import sys

from polymodal.cli import main

if __name__ == "__main__":
    sys.exit(main())
