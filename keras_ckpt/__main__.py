"""`python -m keras_ckpt` is the command `keras-ckpt`."""

from keras_ckpt.cli.commands import main

if __name__ == "__main__":
    main(prog_name="keras-ckpt")
