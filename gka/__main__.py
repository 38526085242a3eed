"""`python -m gka` is the `gka` command."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
