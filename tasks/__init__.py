"""The pipeline's stages and commands."""

import atexit
import gc
import sys

# On a full disk Python 3.11 keeps a bytecode file that is cut off, and fails on it when there is room again.
sys.dont_write_bytecode = True
# At its end Python would look through all that torch holds for garbage, for seconds.
atexit.register(gc.freeze)
