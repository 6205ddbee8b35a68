"""isolator: runs AI agents in boxes that hold exactly what a person granted."""

__version__ = "0.1.0"
