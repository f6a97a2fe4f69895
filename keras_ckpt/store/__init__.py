"""A directory of checkpoints: listed, chosen, verified, committed and pruned.

Pure Python: nothing here imports TensorFlow, Keras or NumPy, so a listing takes a tenth of a second. `files` is the one
module that opens, renames, syncs and unlinks. `commit` has the order of these that survives a crash.
"""
