"""A Keras model's state: named, held at one moment, compared with a checkpoint, restored.

This is the lowest room that knows TensorFlow and Keras.
"""
