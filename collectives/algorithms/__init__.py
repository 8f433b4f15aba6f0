"""Collective algorithms: each is a function that returns a Schedule."""
