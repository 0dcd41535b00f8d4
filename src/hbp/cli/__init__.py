"""The face: the command line, its tables and its exit codes."""
