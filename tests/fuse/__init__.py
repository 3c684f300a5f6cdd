"""The file system: its core on a store, and real mounts of it."""
