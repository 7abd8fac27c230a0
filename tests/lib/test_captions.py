"""The judge of captions by rules, held against events that people would say are told or not."""

import doctest

import pytest

from lib import captions
from lib.captions import words_judge

# Invented: an event, a caption, and whether a person would say that the caption tells the event.
JUDGED = [
    # the same event in other words or forms, in a detail more or less, in two sentences, among other events
    ("A man opens the door", "A man is opening a red door.", True),
    ("A man opens the door", "There is a door. The man opened it and left.", True),
    ("A woman carries two bags", "Two heavy bags are carried by a woman.", True),
    ("The dog is chasing its tail", "A dog chases its own tail on the lawn.", True),
    ("A boy kicks the ball", "Some boys stand around. A boy kicks a ball towards the goal.", True),
    ("The screen turns red", "At 3 s the screen turns red, then grey again.", True),
    ("Children are running on the beach", "The beach is empty at first. Then children run along it.", True),
    ("She puts the cups on the table", "She is putting some cups on a table.", True),
    ("A white square moves to the right", "The white square is moving right.", True),
    ("The cat jumps onto the sofa and sleeps", "A cat jumps on a sofa. There it sleeps.", True),
    ("A man in a blue shirt picks up a cup", "A man with a blue shirt picks up a white cup.", True),
    ("The chef cuts an onion and fries it in a pan", "A chef cuts onions. He is frying them in a hot pan.", True),
    ("He closes the laptop", "The man closed his laptop and stood up.", True),
    ("A girl blows out the candles on a cake", "A girl blows out candles on her birthday cake.", True),
    ("A cyclist in a yellow jersey falls near the finish line", "Near the finish, a cyclist in yellow falls.", True),
    ("An old man slowly walks across the street", "An old man walks across a busy street.", True),
    ("The boy lifts the heavy box from the floor", "The boy picks a heavy box up from the floor.", True),
    ("A man runs to the bus", "The man ran to a bus.", True),
    # one thing is another: who, what, where, which way; or it is told of several, or nowhere
    ("A man opens the door", "A man closes the door.", False),
    ("A man opens the door", "A man opens a window.", False),
    ("A man opens the door", "The door is brown. A woman reads. Outside a man waits. Later she opens a book.", False),
    ("A woman carries two bags", "A woman carries two children.", False),
    ("The dog is chasing its tail", "A dog sleeps in the sun.", False),
    ("A boy kicks the ball", "A boy throws the ball.", False),
    ("The screen turns red", "The screen turns blue.", False),
    ("Children are running on the beach", "Children are sitting on the beach.", False),
    ("She puts the cups on the table", "She takes the cups from the table.", False),
    ("A white square moves to the right", "A white square moves to the left.", False),
    ("The cat jumps onto the sofa and sleeps", "A dog lies on the sofa and sleeps.", False),
    ("A man in a blue shirt picks up a cup", "A woman in a blue shirt puts a cup down.", False),
    ("The chef cuts an onion and fries it in a pan", "The chef washes a pan. He cuts some bread.", False),
    ("He closes the laptop", "He opens the laptop.", False),
    ("A girl blows out the candles on a cake", "A girl cuts a cake.", False),
    ("A girl blows out the candles on a cake", "A girl lights the candles on a cake.", False),
    ("An old man slowly walks across the street", "An old car drives across the street.", False),
    ("The man bites the dog", "The dog bites the man.", False),
]


def mistakes(share):
    """(told but missed, not told but found) among JUDGED, with this share of content words as the limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "TOLD_SHARE", share)
        wrong = [is_told for event, caption, is_told in JUDGED if words_judge(event, caption) != is_told]
    return sum(wrong), len(wrong) - sum(wrong)


def test_the_share_of_words_is_the_one_with_the_fewest_mistakes():
    """The number was chosen on this table. A lower one takes another colour, verb or way for the event, and what is
    paid for without having happened is what a policy finds first."""
    assert mistakes(captions.TOLD_SHARE) == (2, 1)
    for share in (0.4, 0.5, 0.6, 0.7, 0.75, 0.85, 0.9, 1.0):
        assert sum(mistakes(share)) > sum(mistakes(captions.TOLD_SHARE))
    assert mistakes(0.6) == (0, 12)
    assert len(JUDGED) == 36 and sum(is_told for *_, is_told in JUDGED) == 18


def test_an_event_is_told_in_one_sentence_or_two_neighbours():
    """Compared with the caption as a whole, a list of all words tells everything."""
    event = "a man opens the door"
    assert words_judge(event, "A man appears. He opens the door.")
    assert words_judge(event, "A man appears\nhe opens the door")
    assert not words_judge(event, "A man appears. It rains. He opens the door.")
    assert not words_judge(event, "The man. " + "It rains. " * 100 + "The door opens.")
    filler = " ".join(f"word{k}" for k in range(60))
    assert not words_judge(event, f"man {filler} opens {filler} door")  # no full stop, and still no one sentence
    assert words_judge(event, f"{filler} the man opens the door {filler}")
    assert words_judge("the ball rolls 12.5 m", "It rolls, the ball, 12.5 m.")  # no sentence ends inside a number
    assert not words_judge(event, "") and not words_judge("?!", "A man opens the door.")


def test_what_the_rules_cannot_see():
    """The docstring admits these; a rule that learns to see one of them should say so here."""
    assert words_judge("the man bites the dog", "The dog bites the man.")
    assert words_judge("a man opens the door", "Nobody knows why the man never opened the door.")
    assert words_judge("a man opens the door", "man door open cup dog car")
    assert not words_judge("a man lifts a cup", "He picks up a mug.")


@pytest.mark.parametrize("forms", [
    "open opens opened opening", "carry carries carried carrying", "close closes closed closing", "put puts putting",
    "box boxes", "watch watches watched", "dress dresses", "horse horses", "bus buses", "fall falls falling",
    "try tries tried", "play plays played playing", "movie movies", "die dies died dying", "use uses used using",
    "go goes going", "see sees seeing", "size sizes", "kiss kisses kissed kissing", "stop stops stopped stopping",
    "add adds added", "shoe shoes", "wash washes", "CUT cuts cutting",
])
def test_the_regular_forms_of_a_word_are_one(forms):
    first, *others = forms.split()
    for other in others:
        assert captions.content_words(first) == captions.content_words(other)


def test_words_that_only_look_like_forms_are_left_alone():
    """red is no past of "r": a colour cut down to one letter would equal any other."""
    for word in ("red", "bed", "speed", "sing", "ring", "string", "bus", "11", "100", "22", "2s", "s"):
        assert captions.stem(word) == word
    assert captions.content_words("It is he.") == {"it", "is", "h"}  # nothing but stop words: better than no words


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(captions)
    assert result.failed == 0 and result.attempted >= 4
