"""``python -m onsphere``: the command line, as ``onsphere`` is."""

import sys

from onsphere.cli import main

if __name__ == "__main__":
    sys.exit(main())
