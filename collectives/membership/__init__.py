"""Who is here: coordinator and member state machines, their journal and their I/O."""
