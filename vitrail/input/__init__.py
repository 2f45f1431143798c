"""Bytes to batches on the training device: what is drawn for each image, done to it, and in which order they come."""
