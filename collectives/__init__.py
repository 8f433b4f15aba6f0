"""Schedules, the engine that runs them, transports, membership and the communicator."""
