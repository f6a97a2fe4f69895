"""The bytes of one checkpoint, to and from memory.

NumPy, but no framework. TensorFlow's bundle is written and read here. Values that an older
checkpoint has already are shared by hard links.
"""
