"""The error tree is the one that its docstring draws, and every error travels between processes."""

import pickle

import pytest

from materialize import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_the_docstring_draws_the_real_tree():
    drawn, parents = {}, {}
    for line in errors.__doc__.splitlines():
        words = line.replace("|-", "").replace("`-", "").replace("|", " ").split()
        if words and words[0] in errors.__all__:
            depth = line.index(words[0])
            parents = {known: name for known, name in parents.items() if known < depth}
            drawn[words[0]] = parents[max(parents)] if parents else "Exception"
            parents[depth] = words[0]

    assert drawn == {cls.__name__: cls.__base__.__name__ for cls in CLASSES}


def test_every_error_of_the_module_is_public_and_the_list_is_sorted():
    defined = [name for name, value in vars(errors).items() if isinstance(value, type)]

    assert errors.__all__ == sorted(defined)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_pickling(cls):
    copy = pickle.loads(pickle.dumps(cls("what happened")))

    assert type(copy) is cls
    assert str(copy) == "what happened"


def test_the_reason_of_a_needed_rebuild_survives_pickling():
    copy = pickle.loads(pickle.dumps(errors.RebuildNeeded("could not read what changed: gone", "gone")))

    assert (str(copy), copy.reason) == ("could not read what changed: gone", "gone")
    assert errors.RebuildNeeded("what happened").reason == ""
