"""What is read: pictures, transforms, data sets, loaders."""
