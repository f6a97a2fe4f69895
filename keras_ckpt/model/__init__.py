"""The state of a Keras model: named, snapshotted, compared with a checkpoint, restored.

This is the lowest package that imports TensorFlow and Keras.
"""
