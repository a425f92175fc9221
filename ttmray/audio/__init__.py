"""Audio as numpy arrays: reading and writing, segments, loudness, mel spectrograms.

Everywhere in this package audio is float32 of shape (channels, frames), full scale 1.0.
"""
