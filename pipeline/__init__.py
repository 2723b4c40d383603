"""What the user types: commands, presets, the registry of parts, and the run folder.

Nothing heavy is imported by this package's modules at import time; ``pipeline.cli`` loads torch and friends inside a
command, so that ``pipeline --help`` answers at once.
"""
