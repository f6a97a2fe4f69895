"""The data and the model of the notebooks: scikit-learn's handwritten digits, and a small network."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's log would fill the notebooks

import keras
from sklearn.datasets import load_digits

images, digits = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
training, validation, test = ((images[third::3], digits[third::3]) for third in range(3))


def build(units=32, rate=0.04):
    """A network with one hidden layer. Its random weights are the same at each call."""
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(units, activation="relu", name="hidden"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10, activation="softmax", name="output"),
        ],
        name="digits",
    )
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
