"""How the images of a data set are decoded, as `data` states, and as the headers of its files require."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vpt.config.errors import config_keys
from vpt.config.schema import Config
from vpt.data.images import Decoding
from vpt.data.ranges import find_range, format_range, parse_range, scan_headers

AUTO = "auto"


def build_decoding(config: Config) -> Decoding:
    """The decoding of a config; with `data.range=auto` it has no range yet. A ConfigError for a value out of range."""
    data = config.data
    bands: Any = None if data.bands is None else tuple(data.bands)
    with config_keys(range="data.range", bands="data.bands", background="data.background"):
        found = None if data.range == AUTO else parse_range(data.range)
        return Decoding(data.max_pixels, data.background, found, bands)


def find_decoding(config: Config, samples: Mapping[str, Any], decoding: Decoding) -> tuple[Decoding, list[str]]:
    """The decoding with the range that `data.range=auto` finds over train, and lines on what was found."""
    scans = {split: scan_headers(members.paths, decoding) for split, members in samples.items()}
    notes, deep = [], scans["train"].deep
    if config.data.range == AUTO and deep:
        decoding = replace(decoding, range=find_range(deep, decoding))
    for split, scan in scans.items():
        if scan.deep:
            known = f"{len(scan.deep):,} of {len(samples[split]):,} {split} images have more than 8 bits per channel"
            notes.append(f"{known}: data.range={format_range(decoding.range)} becomes 0 to 255")
        if scan.ignored:
            known = f"{len(scan.ignored):,} {split} images have damaged or very large metadata"
            notes.append(f"{known}: ignored, also an EXIF orientation; first {scan.ignored[0]}")
    return decoding, notes
