"""Images, samples, transforms, readers and loaders."""
