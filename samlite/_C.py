"""The compiled module: the one that fits the torch of this process takes the place of this file's module."""

import sys

from samlite.native.modules import load

sys.modules[__name__] = load()
