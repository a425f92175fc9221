"""Trainers for the parts of a bundle: VAE, vocoder, CLAP, separator, music encoder, text encoder.

`python jobs/train_micro.py` trains small ones on the synthetic songs of `ttmray.synth`. Each part has one file with its
loss, its data, its measures and the full-size recipe that it follows; all share one loop (`loop`).
"""
