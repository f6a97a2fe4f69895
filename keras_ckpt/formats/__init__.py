"""The bytes of one checkpoint, to and from memory.

This room uses NumPy, but no framework. It writes and reads TensorFlow's bundle format, and shares the values that an
older checkpoint holds by hard links.
"""
