"""One file per kind of frame source, and what they share; the door is ``stages/data/frames.py``."""
