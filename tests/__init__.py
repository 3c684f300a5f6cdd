"""The tests; a package, so that the conftest of each folder has a name of its own."""
