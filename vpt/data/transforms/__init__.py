"""Transforms of an RGB image to a normalised tensor."""
