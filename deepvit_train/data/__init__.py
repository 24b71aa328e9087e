"""Folders of images: index, decoding, augmentation, the order of samples, loaders."""
