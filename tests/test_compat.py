"""Canaries: each fails, saying what changed, when a new version of a library breaks what compat.py relies on."""


# transformers


# accelerate


# datasets


# evaluate


# kornia
