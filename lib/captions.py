"""A judge of captions by rules: (event, caption) -> does the caption tell the event?

The reward of a caption is the share of the annotated events that it tells (rewards.py, `event_recall`). A language model
can be asked instead (lib/judge.py). Pure Python.
"""

import re
from collections.abc import Callable
from functools import lru_cache

Judge = Callable[[str, str], bool]  # (event, caption): does the caption tell the event?

# An event is told if this share of its content words stands in the caption, close together. Chosen on the 36 invented
# pairs of tests/lib/test_captions.py, where it makes the fewest mistakes; real captions may want another number.
TOLD_SHARE = 0.8
LONGEST_SENTENCE = 30  # words; text that never stops is cut, or a list of all words would be one sentence

# What carries no event: articles, pronouns, auxiliaries, conjunctions and the commonest prepositions. Not among them
# are words that can turn an event round: not, no, up, down, left, right, out, off.
STOP_WORDS = frozenset("""
    a an the this that these those there here it its he him his she her hers they them their theirs we us our i me my
    you your who whom whose which what something someone one ones some any is am are was were be been being has have
    had having do does did doing will would can could may might shall should must and or but so then than as while
    when where in on of to from with by for at into onto about around through during before after also very just
    s t re ll ve d m
    """.split())
WORD = re.compile(r"[^\W_]+")
SENTENCE_END = re.compile(r"(?<=[.!?;])\s|\n")  # a full stop inside 12.5 ends nothing
VOWEL = re.compile(r"[aeiouy]")


def words_judge(event: str, caption: str) -> bool:
    """Does the caption tell the event? Rules instead of a language model: instant, and the same on every machine.

    At least TOLD_SHARE of the event's content words, stemmed, must stand in one sentence of the caption or in two
    neighbouring ones ("A man comes in. He sits down."). Not in the caption as a whole: every event whose words are
    scattered over a long text would count, and a model would soon learn to write word lists.

    What fools it: synonyms and irregular forms ("lifts" for "picks up", "ran" for "runs") are not recognised; who does
    what to whom, and negation, are not seen at all, so that "the dog bites the man" tells that the man bites the dog;
    and a short list of the right words earns as much as a sentence. It is made for English. `LanguageModelJudge` in
    lib/judge.py asks a model instead, as VideoChat-R1 did (Qwen2.5-72B there).

    >>> words_judge("a man opens the door", "A woman waits. A man is opening a red door.")
    True
    >>> words_judge("a man opens the door", "A man closes the door.")
    False
    >>> words_judge("a man opens it", "A man. A dog. It opens.")
    False
    """
    wanted = content_words(event)
    found = [wanted & sentence for sentence in sentence_words(caption)]
    pairs = [a | b for a, b in zip(found, found[1:])]
    most = max(map(len, found + pairs), default=0)
    return most > 0 and most >= TOLD_SHARE * len(wanted)


def content_words(text: str) -> frozenset[str]:
    """The stems that say what happens; of a text that has stop words only, those."""
    words = WORD.findall(text.lower())
    return frozenset(map(stem, [word for word in words if word not in STOP_WORDS] or words))


@lru_cache(maxsize=8)  # a caption is asked about once for each event
def sentence_words(caption: str) -> list[frozenset[str]]:
    """The content words of each sentence, which ends at LONGEST_SENTENCE words if nothing else ends it."""
    sentences = []
    for sentence in split_sentences(caption):
        words = WORD.findall(sentence)
        pieces = [words[i:i + LONGEST_SENTENCE] for i in range(0, len(words), LONGEST_SENTENCE)]
        sentences += [content_words(" ".join(piece)) for piece in pieces]
    return sentences


def split_sentences(text: str) -> list[str]:
    """The sentences of a text that have a word in them; an abbreviation such as "Mr. X" is cut too, which does no harm.

    >>> split_sentences("It lasts 12.5 s. He leaves... ?")
    ['It lasts 12.5 s.', 'He leaves...']
    """
    return [sentence.strip() for sentence in SENTENCE_END.split(text) if WORD.search(sentence)]


def as_caption(events: list[str]) -> str:
    """The annotated events as one text: a sentence each, in their order.

    >>> as_caption(["a man opens a door", "He leaves."])
    'A man opens a door. He leaves.'
    """
    events = [event.strip() for event in events]
    return " ".join(event[0].upper() + event[1:] + ("" if event[-1] in ".!?" else ".") for event in events)


def stem(word: str) -> str:
    """The common part of a word's regular forms: opens, opened, opening -> open; carries, carried, carry -> carri.

    By hand and short, for verbs and plurals only: no irregular form (ran, men), no derived word (opener, quickly), and
    some different words fall together (hoping, hopping). Each side is stemmed alike, so the result need not be a word.
    """
    if not word.isalpha():  # 11, 5th
        return word
    if word.endswith(("ies", "ied")):
        word = word[:-2]
    elif word.endswith(("ses", "xes", "zes", "ches", "shes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 2:
        word = word[:-1]
    elif word.endswith("ing") and VOWEL.search(word[:-3]):  # not: sing, string
        word = word[:-3]
    elif word.endswith("ed") and not word.endswith("eed") and VOWEL.search(word[:-2]):  # not: red, speed
        word = word[:-2]
    word = word.removesuffix("e") or word  # closes, closing, close
    if word[-2:-1] == word[-1:] and not VOWEL.match(word[-1]):  # putting, put
        word = word[:-1]
    return word[:-1] + "i" if word.endswith("y") else word


def told(judge: Judge, pairs: list[tuple[str, str]]) -> list[bool]:
    """The judge's answer for each (event, caption); a judge with a method `ask` takes all of them at once."""
    ask = getattr(judge, "ask", None)
    return ask(pairs) if ask else [bool(judge(event, caption)) for event, caption in pairs]
