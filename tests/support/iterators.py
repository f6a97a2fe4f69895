"""The end of an iterator of `tf.data`, which may wait for a thread."""

import keras


def end_at_once() -> None:
    """Turns the autotuning of `tf.data` off in this process: the thread that tunes an iterator delays its end.

    The thread sleeps between two rounds. TensorFlow wakes it up just before it says that the iterator ends, so the
    thread may sleep for another round. A round gets as long as the iterator has lived, up to a minute.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.data.experimental.AutotuneOptions.enabled = False
