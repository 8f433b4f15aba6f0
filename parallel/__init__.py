"""Layouts and the plans built on them."""
