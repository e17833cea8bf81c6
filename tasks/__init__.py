"""The pipeline's stages and commands."""

import sys

# On a full disk Python 3.11 keeps a bytecode file that is cut off, and fails on it when there is room again.
sys.dont_write_bytecode = True
