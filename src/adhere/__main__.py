"""`python -m adhere`: the command line."""

import sys

from adhere.cli import main

if __name__ == "__main__":
    sys.exit(main())
