"""Logits to figures: accuracy, calibration, confusions, and what frozen features are worth."""
