"""Checkpoints: layouts at rest."""
