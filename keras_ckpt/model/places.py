"""The places of a model's values in Keras's own files, so that a checkpoint becomes such a file without Keras."""

from __future__ import annotations

from collections.abc import Mapping

import keras

from keras_ckpt.formats.config import Place
from keras_ckpt.model.keras_internals import places_in_files
from keras_ckpt.model.learned import saved_by, saves_variables


def places_of(model: keras.Model, names: Mapping[int, str], learners: Mapping[int, str]) -> dict[str, Place]:
    """The objects of a model by their paths in Keras's own files, none if a method of an object raises an error.

    Call it in any thread.

    Args:
        model: The model.
        names: The names of the variables in a checkpoint, by identity.
        learners: The names of the objects whose learned state the checkpoint describes, by identity.
    """
    try:
        places = {path: _place(each, names, learners) for path, each in places_in_files(model).items()}
    except Exception:  # noqa: BLE001 - an error in a user's method must not end training
        return {}
    return {path: place for path, place in places.items() if place is not None}


def _place(each: object, names: Mapping[int, str], learners: Mapping[int, str]) -> Place | None:
    """The place of an object, `None` for an optimizer whose variables the checkpoint lacks."""
    name, learned = getattr(each, "name", None), learners.get(id(each), "")
    # The learned state has the values of an object that decides about them, at the moment of each save.
    answers = {} if learned and saves_variables(each) else saved_by(each)
    variables = {key: names.get(id(value), "") for key, value in answers.items()}
    if isinstance(each, keras.optimizers.Optimizer) and "" in variables.values():
        return None
    return Place(name if isinstance(name, str) else None, variables, learned)
