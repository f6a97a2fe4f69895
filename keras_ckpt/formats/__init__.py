"""The bytes of one checkpoint, to and from memory.

NumPy, but no framework. TensorFlow's bundle is written here, and its index is read. Values that an older
checkpoint has already are shared by hard links.
"""
