"""Groups of commands of the command line, and what they share (place.py)."""
