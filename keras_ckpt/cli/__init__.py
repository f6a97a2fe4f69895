"""The command `keras-ckpt`, and its demo."""

from keras_ckpt.cli.commands import main as main
