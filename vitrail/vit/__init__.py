"""The Vision Transformer of the paper, what later papers add, the ResNet beside it, and what they take."""
