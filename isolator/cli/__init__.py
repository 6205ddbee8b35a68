"""The command line, on the Python client alone: one module of commands for each noun."""
