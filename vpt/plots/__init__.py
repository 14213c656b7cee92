"""Figures and image grids, drawn by matplotlib; every function returns an (H, W, 3) uint8 array."""
