"""Checkpoints for Keras: kept by policy, explained by sidecars, never lost.

A name is loaded when it is first used, so reading a directory does not wait for TensorFlow. `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
