"""The backends of Keras: one module each, with the same names. `backend` is the module of this process.

No other module below `model` imports TensorFlow, JAX or PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

__all__ = ["NAMES", "backend"]
NAMES = ("tensorflow", "jax", "torch")
"""The backends that train models. A sidecar has the name of its backend, with the version of the package."""
_NAME = keras.backend.backend()

if TYPE_CHECKING or _NAME == "tensorflow":
    from keras_ckpt.model.backends import tensorflow as backend
elif _NAME == "jax":
    from keras_ckpt.model.backends import jax as backend
elif _NAME == "torch":
    from keras_ckpt.model.backends import torch as backend
else:
    raise ImportError(
        f"keras_ckpt saves and restores models of Keras's backends tensorflow, jax and torch. Received: {_NAME}, which "
        "trains no models. Set the environment variable KERAS_BACKEND before Keras is imported. The command line, "
        "keras_ckpt.CheckpointDirectory and keras_ckpt.load_variables work with every backend."
    )
