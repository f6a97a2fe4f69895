"""Prints the requirements of this package and of extras, but not TensorFlow: `without_tensorflow.py suite jax`."""

import configparser
import sys

parser = configparser.ConfigParser()
parser.read("setup.cfg")
waiting, found = ["install_requires", *sys.argv[1:]], []
for name in waiting:
    section = "options" if name == "install_requires" else "options.extras_require"
    for requirement in parser[section][name].split("\n"):
        if requirement.startswith("keras-ckpt["):
            waiting += requirement.partition("[")[2].rstrip("]").split(",")
        elif requirement and not requirement.startswith("tensorflow"):
            found.append(requirement)
print(*found, sep="\n")
