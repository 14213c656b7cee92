"""Transforms: from an RGB image to a normalised tensor."""
