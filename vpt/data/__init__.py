"""Images, samples, splits, readers, transforms, loaders and caches."""
