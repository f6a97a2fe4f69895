"""A run that is killed and resumed ends with the same bits as an undisturbed run."""

import signal

import pytest

from resume import script, trials


@pytest.fixture(scope="module")
def station():
    """The process from which trainings are forked. It has Keras and its backend loaded."""
    with trials.prepared() as executor:
        yield executor


@pytest.fixture(scope="module")
def whole(station):
    """The digests of each undisturbed run."""
    results = {}

    def of(name: str) -> dict[str, str]:
        if name not in results:
            results[name] = station.submit(trials.whole, name).result()
        return results[name]

    return of


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", script.ROWS)
def test_a_run_that_is_killed_at_a_batch_ends_as_if_it_were_not(station, whole, tally, long, dice, name) -> None:
    """The kill comes at each batch in turn in the long form, at a random batch in the short form.

    The callback has another place in the list each time.
    """
    last = script.ROWS[name].executions
    points = enumerate(range(1, last + 1)) if long else [(dice.randrange(8), dice.randint(1, last))]
    for place, at in points:
        found, resumes, seconds = station.submit(trials.killed, name, at, place).result()
        different = differing(found, whole(name))
        tally.update(trials=1, resumed=resumes, differing=bool(different))
        assert not different, (at, place)
        # The first backup begins at the end of the first batch, and is on disk within a second. Some batches are
        # trained meanwhile.
        assert resumes or at < 10 or seconds < 1, (at, place, seconds)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name", [name for name in ("Arrays", "Pipeline", "Generated", "Loaded") if name in script.ROWS]
)
def test_a_run_that_is_killed_often_ends_as_if_it_were_not(station, whole, tally, long, dice, name) -> None:
    """At random moments: in a batch, in a save, while the model is compiled; ten times in the long form."""
    kills = 10 if long else 3
    for seed in range(10) if long else [dice.randrange(1 << 30)]:
        found = station.submit(trials.killed_often, name, kills, seed).result()
        different = differing(found, whole(name))
        tally.update(trials=1, kills=kills, differing=bool(different))
        assert not different, seed


CODES = {signal.SIGTERM: -signal.SIGTERM, signal.SIGUSR1: -signal.SIGUSR1, signal.SIGINT: 130}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", [name for name in ("Arrays", "Pipeline", "Loaded") if name in script.ROWS])
def test_a_run_that_is_asked_to_end_has_all_that_it_trained(station, whole, tally, long, dice, name) -> None:
    """At random moments, in validation and between epochs too; the exit code is that of the signal.

    The long form sends each signal 17 times, the short form sends one signal once.
    """
    pairs = [(number, seed) for number in CODES for seed in range(17)]
    for number, seed in pairs if long else [dice.choice(pairs)]:
        found, code, complete = station.submit(trials.signalled, name, number, seed).result()
        different = differing(found, whole(name))
        tally.update(trials=1, differing=bool(different), incomplete=not complete)
        assert code == CODES[number], (number, seed)
        assert not different, (number, seed)
        assert complete, (number, seed)
