"""`python -m freqseg` is the command `freqseg`."""

import sys

from freqseg.faces.cli import main

if __name__ == "__main__":
    sys.exit(main())
