"""Where an answer is looked for in a response, and where it is not."""

import pytest

from verifier.answers import MAX_BARE, answer_in, reference_in


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed 7", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{3}", "3"),
        ("It is 5.\n#### 5", "5"),
        ("#### 5\n#### 6", "6"),
        ("Answer: 62", "62"),
        ("**Answer:** 62.", "62"),
        ("✅ Final Answer: **73**", "73"),
        ("Answer:\n42", "42"),
        ("Long.\nThe answer is 3.5. I am sure.", "3.5"),
        ("The answer is: 1,000", "1,000"),
        ("the answer is 1 and then the answer is 2", "2"),
        ("42", "42"),
        (" 42.\n", "42"),
        (r"The answer is 4. \boxed{5}", "5"),
    ],
)
def test_the_last_answer_is_found(text: str, answer: str) -> None:
    assert answer_in(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{5} Hmm. \boxed{}",
        r"\boxed{5} Hmm. \boxed{ }",
        r"\boxed{5} Hmm. \boxed{\frac{6}{7}",
        r"\boxed{5} Hmm. \boxed",
        r"The answer is 5. \boxed{",
        "#### ",
        "<think> it is 42",
        r"<think> it is \boxed{42}",
        r"<think> a </think> \boxed{1} <think> \boxed{42}",
        "",
    ],
)
def test_an_answer_whose_place_is_empty_broken_or_lost_in_thought_is_empty(text: str) -> None:
    assert answer_in(text) == ""


def test_only_what_follows_the_thoughts_counts() -> None:
    assert answer_in(r"<think> \boxed{42} </think> no: \boxed{43}") == "43"
    assert answer_in(r"opened in the prompt \boxed{42} </think> 43") == "43"
    assert answer_in(r"<think> \boxed{42} </think>" + " I forgot." * 20) is None


def test_a_long_response_without_a_place_for_an_answer_has_none() -> None:
    assert answer_in("4" * MAX_BARE) == "4" * MAX_BARE
    assert answer_in("4" * (MAX_BARE + 1)) is None
    assert answer_in("first line\n42") is None


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("42", "42"),
        ("He has 5.\n#### 5", "5"),
        (r"so $\boxed{7}$", "7"),
        (" 1/2 ", "1/2"),
        ("The answer is", "The answer is"),
    ],
)
def test_a_reference_may_be_a_whole_solution(answer: str, found: str) -> None:
    assert reference_in(answer) == found
