"""Figures and image grids, drawn by matplotlib; every function returns an (H, W, 3) uint8 array."""

import logging

# On import, matplotlib warns on stderr if it has to build its font cache or cannot store it.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
