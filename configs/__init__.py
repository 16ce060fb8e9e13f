"""Settings files that ship with the project. Each says only what differs from the defaults."""
