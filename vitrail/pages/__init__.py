"""Runs and models to pages and pictures."""
