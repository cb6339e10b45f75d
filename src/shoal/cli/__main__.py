"""`python -m shoal.cli`: the same as `shoal`, for processes that Shoal starts itself."""

import sys

from shoal.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
