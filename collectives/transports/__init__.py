"""Transports: how the bytes of one epoch move between its members."""
