"""Readers and writers of other checkpoint formats."""
