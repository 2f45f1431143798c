"""Run folders, and weights in and out: the official code's, transformers' and timm's."""
