"""`python -m lolcats.cli`."""

import sys

from lolcats.cli import main

if __name__ == "__main__":
    sys.exit(main())
