"""TensorFlow, for the tests that compare with it or hand it over. On other backends such a test is skipped."""

from __future__ import annotations

from typing import Any

import keras
import pytest

needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="is TensorFlow's, or needs TensorFlow in Keras"
)
needs_executions = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has no steps_per_execution on PyTorch"
)

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
else:

    class _Absent:
        """Skips the test that asks for an attribute."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            pytest.skip(f"needs tf.{name}, and the backend is {keras.backend.backend()}")

    tf = _Absent()
