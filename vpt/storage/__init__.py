"""Storage: atomic files, locks, archives."""
