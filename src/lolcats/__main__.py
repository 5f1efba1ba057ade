"""`python -m lolcats`, which is how `torchrun` starts it."""

import sys

from lolcats_command import main

if __name__ == "__main__":
    sys.exit(main())
