"""ttmray: from a folder or bucket of songs to a preference-tuned text-to-music model, on Ray."""

__version__ = "0.1.0"
