"""Imported first in a Python script's sandbox: makes the packages it was given importable."""

import sys

sys.path.append("/packages")
