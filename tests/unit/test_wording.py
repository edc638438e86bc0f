"""Numbers of things, steps and lists in sentences."""

from llmtrain.wording import count, listed, name_range, name_steps


def test_lists_end_with_and_and_long_ones_with_how_many_more():
    assert listed([]) == "none"
    assert listed([1]) == "1"
    assert listed(range(1, 9)) == "1, 2, 3, 4, 5 and 3 more"
    assert listed(range(1, 9), most=8) == "1, 2, 3, 4, 5, 6, 7 and 8"


def test_of_many_steps_the_first_are_named():
    assert name_steps([5]) == "step 5"
    assert name_steps([5, 6]) == "steps 5 and 6"
    assert name_steps([1, 2, 3, 4, 5, 6]) == "steps 1, 2, 3, 4, 5 and 6"
    assert name_steps(range(1, 1001)) == "steps 1, 2, 3, 4, 5 and 995 more"
    assert (name_range(7, 7), name_range(3, 1_200)) == ("step 7", "steps 3 to 1,200")


def test_one_thing_has_no_plural():
    assert [count(number, "row") for number in (0, 1, 2, 1_000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
