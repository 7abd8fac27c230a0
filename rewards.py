"""What is a good answer? A completion goes in as plain text, numbers in [0, 1] come out.

    <think> it is lifted after 12 s </think> <answer> 12.54 to 17.83 </answer>

Every task has a reward for *what* was answered and one for *how*: `format` is 1 or 0, the others measure the answer
against the annotation, in time (`temporal_iou`), in space (`box_iou`), as right or wrong (`accuracy`), or by
the annotated events that a caption tells (`event_recall`). Training and evaluation call the same functions, so what is
optimised is what is reported.

Read in this order: three overlap measures; the blocks of a completion; one parser for each kind of answer; the truth of
a sample; what each task is paid for (`REWARDS`); `score`; the command line `python rewards.py completions.jsonl`.

Two decisions shape everything below. Malformed model output is normal and scores 0 with a reason; a malformed *sample*
is a mistake in the data and raises. And an answer is never repaired: swapping a reversed one or clipping it to the
video would pay for something that the model did not say.

Left out on purpose: rewards for length, partial credit for unreadable answers. What a caption tells is judged by the
rules of lib/captions.py, or by the one model that may have a say, in lib/judge.py. The published parsers differ between
training and evaluation; here there is one.
"""

import argparse
import json
import math
import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from lib.captions import Judge, as_caption, split_sentences, told, words_judge
from lib.samples import LETTERS, entry_of, field_problem, option_texts, value_problem

Span = tuple[float, float]  # start, end in seconds
Box = Sequence[float]  # x0, y0, x1, y1, normalised to [0, 1]


class Score(NamedTuple):
    """The reward of one completion.

    `parts` has the same names for every completion of a task. `reason` is "ok", or why some part is 0.
    """

    total: float
    parts: dict[str, float]
    reason: str


# Ways to make one number of the parts; see `score`.
MIXES = ("sum", "videochat_r1", "temporal_r1", "discrete", "continuous")


# ---- Overlap in time and space ---------------------------------------------------------------------------------------


def temporal_iou(prediction: Span, truth: Span) -> float:
    """Intersection over union of two intervals, in [0, 1] (VideoChat-R1's R_iou, Temporal-R1's IoU).

    A reversed prediction scores 0. A reversed truth is sorted: four annotations of Charades-STA are, and would
    otherwise be out of reach for ever.

    >>> temporal_iou((12, 18), (10, 20))
    0.6
    >>> temporal_iou((18, 12), (10, 20)), temporal_iou((13, 38), (38, 13))
    (0.0, 1.0)
    """
    (start, end), (true_start, true_end) = prediction, sorted(truth)
    # The overlap of a reversed interval is negative, as that of disjoint ones, so neither needs a case of its own.
    # The hull equals the union whenever the intervals overlap; where they do not, nothing is divided by it.
    return ratio(min(end, true_end) - max(start, true_start), max(end, true_end) - min(start, true_start))


def spans_iou(predictions: Sequence[Span], truths: Sequence[Span]) -> float:
    """Intersection over union of two *sets* of seconds, in [0, 1] (VideoChat-R1's reward for grounded questions).

    Overlapping and touching windows are merged on both sides first, so that naming a window twice gains nothing.
    One reversed prediction makes the whole answer 0.

    >>> round(spans_iou([(5, 10), (7, 12)], [(5, 10), (20, 25)]), 4)
    0.4167
    """
    if not all(start <= end for start, end in predictions):  # a negative length would shrink the union
        return 0.0
    predicted, true = merge(predictions), merge(sorted(truth) for truth in truths)
    shared = sum(max(0.0, min(e, te) - max(s, ts)) for s, e in predicted for ts, te in true)
    return ratio(shared, sum(e - s for s, e in predicted) + sum(e - s for s, e in true) - shared)


def merge(spans: Iterable[Sequence[float]]) -> list[list[float]]:
    """The same seconds as disjoint [start, end], in order; what only touches becomes one."""
    merged: list[list[float]] = []
    for start, end in sorted(map(tuple, spans)):  # lists and tuples do not compare
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def box_iou(box: Box, other: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), in [0, 1]; 0 if either has swapped corners or no area.

    >>> box_iou((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5))
    0.3333333333333333
    """
    (x0, y0, x1, y1), (u0, v0, u1, v1) = box, other
    # Swapped corners make a side of the overlap negative, and the product of two of those must not count as an area.
    shared = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    return ratio(shared, (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared)


def ratio(shared: float, union: float) -> float:
    """shared / union in [0, 1]; 0 where the union is empty, or so large that it overflowed to inf or nan."""
    if not 0 < union < math.inf:  # also for nan: every comparison with it is false
        return 0.0
    return min(max(shared / union, 0.0), 1.0)  # sums of several windows round differently: 1.0000000000000004 occurs


# ---- The blocks of a completion --------------------------------------------------------------------------------------


def last_block(completion: str, tag: str) -> tuple[str | None, str]:
    """The text of the last complete <tag> … </tag>: (text, "ok") or (None, "no_answer_tag" or "no_glue_tag").

    The last one, because a model likes to draft an answer inside its thought. It runs from the last opening tag that
    is closed at all to the nearest closing tag; an unclosed block does not exist.

    >>> last_block("<think><answer>1 to 2</answer></think> <answer>3 to 4</answer> <answer>5", "answer")
    ('3 to 4', 'ok')
    """
    start = completion.rfind(f"<{tag}>", 0, max(0, completion.rfind(f"</{tag}>")))
    if start < 0:
        return None, f"no_{tag}_tag"
    start += len(f"<{tag}>")
    return completion[start:completion.index(f"</{tag}>", start)], "ok"


# ---- One parser for each kind of answer: text -> (value, "ok") or (None, reason) -------------------------------------
#
# Models write nonsense, and long nonsense. So there is no `eval` and no nested repetition: possessive quantifiers
# (`++`, `*+`) never give back what they took, which keeps each pattern linear in the length of its text.

# 12, 12.5, 12., .5, 1e1, m:ss and h:mm:ss
TIME = r"(?:[0-9]++(?::[0-5][0-9]){0,2}(?:\.[0-9]*+)?|\.[0-9]++)(?:e[-+]?[0-9]++)?"
PAIR = re.compile(rf"""
    (?: (?<![\w.-]) (?<![0-9]:) (-?)    # a number begins here, not in the middle of a word, a number or 1:75; a minus
      | (?<=\w-) )                      # is its sign, unless it follows a word or number as the one in 12.0-18.0 does
    (?= ({TIME}) \s*+ (?:seconds?|s)? \s*+ (to|and|-) \s*+ (-?) ({TIME})
        (?:seconds?|s)? (?! \w | [.:]?[0-9] ) )     # nor may the second number end in the middle of one
    """, re.IGNORECASE | re.VERBOSE)


def parse_interval(text: str) -> tuple[Span | None, str]:
    """Seconds (start, end) from `12.54 to 17.83` or `{"start_time": "12.54", "end_time": "17.83"}`.

    Of several pairs the last one counts, unless it shares a time with the one before it: "5 to 10 to 20" may mean either.
    Reasons: bad_interval (none, or not finite), reversed_interval.

    >>> parse_interval("The event lasts from 0:05 to 12.5 seconds.")
    ((5.0, 12.5), 'ok')
    >>> parse_interval("-5 - 20"), parse_interval("12.0-18.0")
    (((-5.0, 20.0), 'ok'), ((12.0, 18.0), 'ok'))
    """
    span = json_interval(text)
    if span is None:
        before, pair = None, None
        # The pattern looks ahead without consuming, so pairs may share a number: "event 1 - 12 to 18" ends in 12 to 18.
        text = text.replace("–", "-").replace("−", "-")  # en dash, and the true minus sign
        for match in PAIR.finditer(text):
            if not is_cut_at_commas(text, match):
                before, pair = pair, match
        if pair is None or (before and before.start(5) == pair.start(2) and before[3].lower() == pair[3].lower() != "-"):
            return None, "bad_interval"
        span = seconds(pair[1], pair[2]), seconds(pair[4], pair[5])
    if not all(map(math.isfinite, span)):
        return None, "bad_interval"
    return (span, "ok") if span[0] <= span[1] else (None, "reversed_interval")


def is_cut_at_commas(text: str, pair: re.Match) -> bool:
    """Whether commas stand inside both of its numbers: of "12,54 to 97,83" nobody has said "54 to 97"."""
    return bool(re.search(r"[0-9],\Z", text[max(pair.start(2) - 2, 0):pair.start(2)])
                and re.match(r",[0-9]", text[pair.end(5):pair.end(5) + 2]))


def seconds(sign: str | None, time: str) -> float:
    """("-", "1:05.5") -> -65.5; a number too large for a float becomes inf."""
    total = 0.0
    for field in time.split(":"):
        total = 60 * total + float(field)
    return -total if sign else total


def json_interval(text: str) -> Span | None:
    """The two times of Temporal-R1's JSON object, nan where one is missing or no number; None if it is no object."""
    try:
        # parse_int=float: an integer of more than 4,300 digits is an error, as a float it is only inf.
        answer = json.loads(text.strip(), parse_int=float) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):  # broken, or nested deeper than Python's stack
        return None
    return None if answer is None else (json_number(answer.get("start_time")), json_number(answer.get("end_time")))


def json_number(value: Any) -> float:
    """A JSON number, or one in quotes, where .5 and 05 will do; nan for everything else: a number with its unit, "1_0" and
    full-width digits, which float() reads and the text path does not."""
    if isinstance(value, str):
        return float(value) if QUOTED_NUMBER.fullmatch(value.strip()) else math.nan
    return value if isinstance(value, float) else math.nan


QUOTED_NUMBER = re.compile(r"[-+]?(?:[0-9]++\.?+[0-9]*+|\.[0-9]++)(?:[eE][-+]?[0-9]++)?")


ROW = re.compile(r"\[([^][()]*+)\]|\(([^][()]*+)\)")  # one [ … ] or ( … ) with no bracket inside
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?")  # as in JSON: neither .5 nor 05
QUOTED = re.compile(r"\"[^\"]*+\"|'[^']*+'")


def parse_rows(text: str) -> list[tuple[str, list[str]]] | None:
    """A list of flat lists or tuples as (bracket, cells); None if it is anything else.

    The cells stay text: numbers, or quoted strings that the caller may refuse. The nesting is two levels deep by
    definition, so cutting at brackets and commas is enough, and no text can exhaust a stack.

    >>> parse_rows("[(1, 2.5), ['a', 3],]")
    [('(', ['1', '2.5']), ('[', ["'a'", '3'])]
    """
    text = text.strip()
    if len(text) < 2 or text[0] != "[" or text[-1] != "]":
        return None
    pieces = ROW.split(text[1:-1])  # gap, inside of [] or None, inside of () or None, gap, …, gap
    gaps = [gap.strip() for gap in pieces[::3]]
    if gaps[0] or any(gap != "," for gap in gaps[1:-1]) or gaps[-1] not in ("", ","):
        return None
    rows = []
    for in_list, in_tuple in zip(pieces[1::3], pieces[2::3], strict=True):
        cells = [cell.strip() for cell in (in_tuple if in_list is None else in_list).split(",")]
        if not cells[-1]:
            cells.pop()  # a trailing comma, or an empty row
        if not all(NUMBER.fullmatch(cell) or QUOTED.fullmatch(cell) for cell in cells):
            return None
        rows.append(("(" if in_list is None else "[", cells))
    return rows


def numbers(cells: list[str]) -> list[float] | None:
    """The cells as floats (inf where one overflows); None if one is a quoted string."""
    return [float(cell) for cell in cells] if all(map(NUMBER.fullmatch, cells)) else None


def parse_windows(text: str) -> tuple[list[Span] | None, str]:
    """The windows of a <glue> block, or of a moments answer, in the order written; `[]` is valid and names none.

    Reasons: bad_glue (no list of pairs of finite numbers), reversed_interval.

    >>> parse_windows("[(5.2, 10.4), [12, 15],]")
    ([(5.2, 10.4), (12.0, 15.0)], 'ok')
    """
    rows = parse_rows(text)
    windows = None if rows is None else [numbers(cells) for _, cells in rows]
    if windows is None or not all(w and len(w) == 2 and all(map(math.isfinite, w)) for w in windows):
        return None, "bad_glue"
    if any(start > end for start, end in windows):
        return None, "reversed_interval"
    return [(start, end) for start, end in windows], "ok"


def parse_moments(text: str) -> tuple[list[Span] | None, str]:
    """The windows of a moments answer, written as in a <glue> block; `[]` says that it is not in this video.

    Reasons: bad_windows (no list of pairs of finite numbers), reversed_interval.

    >>> parse_moments("[]"), parse_moments("[(12, 5)]"), parse_moments("5 to 12")
    (([], 'ok'), (None, 'reversed_interval'), (None, 'bad_windows'))
    """
    windows, reason = parse_windows(text)
    return windows, "bad_windows" if reason == "bad_glue" else reason


def box_cells(text: str) -> list[list[str]] | None:
    """The cells of a list of exactly 8 lists of 4, the form the tracking prompt asks for; None for anything else."""
    rows = parse_rows(text)
    if rows is None or [(bracket, len(cells)) for bracket, cells in rows] != [("[", 4)] * 8:
        return None
    return [cells for _, cells in rows]


def parse_boxes(text: str, units: float = 1) -> tuple[list[list[float]] | None, str]:
    """The 8 boxes of a tracking answer, as fractions of the frame, out of range or not. `units`: what a side of the frame is in
    the model's boxes, 1000 for Qwen3-VL; here alone they become fractions. Reason: bad_boxes."""
    cells = box_cells(text)
    boxes = None if cells is None else [numbers(row) for row in cells]
    if boxes is None or None in boxes:
        return None, "bad_boxes"
    return (boxes if units == 1 else [[value / units for value in box] for box in boxes]), "ok"


LONGEST_COMPOSED = 10_000  # characters: putting accents in order takes the square of their number, 8 s for 100,000 of them


def composed(text: str) -> str:
    """The text in composed characters (NFC), one for "é" and not "e" with an accent behind it. Qwen's tokenizer makes them of
    all that a model reads, so it answers in them; annotations may have either form."""
    return unicodedata.normalize("NFC", text) if len(text) <= LONGEST_COMPOSED else text


# A capital that stands alone: "(C)", "C:", not the one in "Dancing", "C3", "A-frame" or "D's".
LETTER = re.compile(r"(?<!\w)(?<!\w[-'’])[A-Z](?!\w|[-'’]\w)")
ONE_LETTER = re.compile(r"[\W_]*+([A-Za-z])[\W_]*+")  # the whole answer
LOWER_CASE = re.compile(r"[a-z](?=\s*[])]|[.:](?!\w))")  # with its bracket, dot or colon: "c)", not the one in "a boy"
NO_WORD = re.compile(r"\W*+")
NEXT_WORD = re.compile(r"[^\S\n\r\u2028\u2029]++([^\W_]++)")  # on the same line: below the answer its reason may begin
AFTER_LETTER = {"and", "or", "is", "because", "since", "as"}  # "A or B", "I is right"


def parse_letter(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    """The one offered letter that the text names, as a capital. Reasons: bad_choice (none), two_letters.

    An answer that is the text of one option counts as that option. Apart from that a text may hold capitals of its own:
    "A" before a word is an article ("A red ball"), "I" a pronoun, and what is quoted of an option's text ("Plan B") is no
    choice either, but behind the letter itself, or where the answer begins.

    >>> options = ["a dog", "A red ball", "unwrap it"]
    >>> [parse_letter(text, options)[0] for text in ("c", "Answer: (C) unwrap it", "I think it is C", "a red ball")]
    ['C', 'C', 'C', 'B']
    >>> [parse_letter(text, options)[1] for text in ("Dancing", "F", "A or C", "A young boy opens it.")]
    ['bad_choice', 'bad_choice', 'two_letters', 'bad_choice']
    """
    text, options = composed(text), [composed(option).strip() for option in options]
    offered = LETTERS[:len(options)]
    if letter := ONE_LETTER.fullmatch(text):
        return (letter[1].upper(), "ok") if letter[1].upper() in offered else (None, "bad_choice")
    if said := [letter for letter, option in zip(offered, options) if option.lower() == text.strip().lower()]:
        return (said[0], "ok") if len(said) == 1 else (None, "two_letters")
    # An option of one word could be a letter itself: some questions ask which letter was written.
    phrases = [option for option in options if len(option.split()) > 1]
    start = NO_WORD.match(text).end()
    if LOWER_CASE.match(text, start):
        text = text[:start] + text[start].upper() + text[start + 1:]
    found, position = set(), 0
    while match := LETTER.search(text, position):
        letter, position = match[0], match.end()
        quoted = match.start() > start and any(stands_at(text, match.start(), phrase) for phrase in phrases)
        if letter not in offered or quoted or is_word(text, match, option := options[offered.index(letter)]):
            continue
        found.add(letter)
        if len(found) > 1:
            return None, "two_letters"
        position = after_option_text(text, position, option)
    return (found.pop(), "ok") if found else (None, "bad_choice")


def stands_at(text: str, position: int, phrase: str) -> bool:
    return text[position:position + len(phrase)].lower() == phrase.lower()


def is_word(text: str, letter: re.Match, option: str) -> bool:
    """Whether an "A" is an article or an "I" a pronoun, as the word behind it tells: "A boy", "I think", but neither "A or B"
    nor "A unwrap it" where `option`, the letter's own, begins with "unwrap". A single letter is no word: "A C" are two
    choices. Nor is what begins another line."""
    word = NEXT_WORD.match(text, letter.end()) if letter[0] in "AI" else None
    if word is None or (len(word[1]) == 1 and word[1].isalpha()):
        return False
    first = re.search(r"[^\W_]+", option)
    return word[1].lower() not in AFTER_LETTER | ({first[0].lower()} if first else set())


def after_option_text(text: str, position: int, option: str) -> int:
    """Where to read on after a letter: behind its option's text if that follows."""
    begin = NO_WORD.match(text, position).end()
    return begin + len(option) if stands_at(text, begin, option) else position


def parse_label(text: str) -> tuple[str | None, str]:
    """A class label, composed, stripped and in lower case, nothing else changed. Reason: empty_answer."""
    label = composed(text).strip().lower()
    return (label, "ok") if label else (None, "empty_answer")


def parse_caption(text: str) -> tuple[str | None, str]:
    """A caption is any text with a letter or digit in it. Reason: empty_answer."""
    return (composed(text).strip(), "ok") if any(map(str.isalnum, text)) else (None, "empty_answer")


# ---- The truth of a sample: what is wrong here is the data's fault, and is said loudly -------------------------------


def annotated(sample: dict, field: str, find_problem: Callable[[dict, str], str | None] = field_problem) -> Any:
    """One field of the annotation. ValueError with the sample's id where it is missing, or wrong in form."""
    if problem := find_problem(sample, field):
        raise ValueError(f"sample {reprlib.repr(sample.get('id'))}: {problem}")
    return sample[field]


def true_spans(sample: dict) -> list[Span]:
    """The annotated windows in seconds, as annotated: `temporal_iou` and `spans_iou` sort a reversed one."""
    return [(float(start), float(end)) for start, end in annotated(sample, "spans")]


def true_boxes(sample: dict) -> list[list[float]]:
    """The 8 annotated boxes; corners that the annotation swapped are sorted, as a reversed interval is."""
    return [[min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)] for x0, y0, x1, y1 in annotated(sample, "boxes")]


def true_letter(sample: dict) -> str:
    """The right letter; the options are checked too, because they decide which letters are offered."""
    annotated(sample, "options")
    return annotated(sample, "answer")


def true_label(sample: dict) -> str:
    return parse_label(annotated(sample, "answer", value_problem))[0]  # the options play no part in scoring


# ---- What each task is paid for --------------------------------------------------------------------------------------


class Block(NamedTuple):
    """What stands in one pair of tags, and how it is read."""

    parse: Callable[[str, dict], tuple[Any, str]]  # (text, sample) -> (value, "ok") or (None, reason)
    reasons: dict[str, str]  # each reason of the parser, in words
    has_form: Callable[[str], bool] = lambda text: True  # where the prompt prescribes a list: is it one?


INTERVAL = Block(lambda text, sample: parse_interval(text), {
    "bad_interval": "the answer names no start and end", "reversed_interval": "an interval ends before it starts"})
CHOICE = Block(lambda text, sample: parse_letter(text, option_texts(sample)), {
    "bad_choice": "the answer names none of the letters offered", "two_letters": "the answer names two letters"})
WINDOWS = Block(lambda text, sample: parse_windows(text), {
    "bad_glue": "the <glue> block is no list of (start, end)", "reversed_interval": "an interval ends before it starts"},
    has_form=lambda text: parse_windows(text)[0] is not None)
MOMENTS = Block(lambda text, sample: parse_moments(text), {
    "bad_windows": "the answer is no list of (start, end)", "reversed_interval": "an interval ends before it starts"},
    has_form=WINDOWS.has_form)
# Not parse_boxes: eight lists of four quoted strings have the form, though no box can be read from them.
EIGHT_BOXES = Block(lambda text, sample: parse_boxes(text, sample.get("box_units", 1)),
                    {"bad_boxes": "the answer is no list of 8 lists of 4 numbers"},
                    has_form=lambda text: box_cells(text) is not None)
LABEL = Block(lambda text, sample: parse_label(text), {"empty_answer": "the answer is empty"})
CAPTION = Block(lambda text, sample: parse_caption(text), {"empty_answer": "the answer is empty"})

Measured = dict[str, tuple[float, str]]  # part -> (its value, why that is 0 or "ok")


def read(sample: dict, completion: str, tag: str) -> tuple[Any, str]:
    """The last <tag> block, through the parser of the sample's task: (value, "ok") or (None, reason)."""
    text, reason = last_block(completion, tag)
    return (None, reason) if text is None else reward_of(sample["task"]).blocks[tag].parse(text, sample)


def measure(value: float, reason: str, wrong: str) -> tuple[float, str]:
    """A value with its parser's reason, or with `wrong` where the answer could be read and earned nothing."""
    return value, wrong if reason == "ok" and not value else reason


def measure_grounding(sample: dict, completion: str, judge: Judge) -> Measured:
    """When does the event happen?"""
    [truth] = true_spans(sample)
    span, reason = read(sample, completion, "answer")
    return {"temporal_iou": measure(temporal_iou(span, truth) if span else 0.0, reason, "no_overlap")}


def measure_moments(sample: dict, completion: str, judge: Judge) -> Measured:
    """In which seconds does it happen, if it does? The IoU of two sets of seconds; of what is not in this video, 1 for
    `[]` and 0 for any window.

    Nothing is gained by many windows: a comb over the video, however fine, shares less with the truth than the whole
    video does, and to name a window twice adds no second.
    """
    truths = true_spans(sample)
    windows, reason = read(sample, completion, "answer")
    iou = float(not truths) if windows == [] else spans_iou(windows, truths) if windows else 0.0
    return {"temporal_iou": measure(iou, reason, "no_overlap" if truths else "not_in_video")}


def measure_qa(sample: dict, completion: str, judge: Judge) -> Measured:
    """Which option is right?"""
    truth = true_letter(sample)
    letter, reason = read(sample, completion, "answer")
    return {"accuracy": measure(float(letter == truth), reason, "wrong_choice")}


def measure_gqa(sample: dict, completion: str, judge: Judge) -> Measured:
    """Which option is right, and which seconds of the video show it?"""
    truths = true_spans(sample)
    windows, reason = read(sample, completion, "glue")
    iou = spans_iou(windows, truths) if windows else 0.0
    return {"temporal_iou": measure(iou, reason, "no_overlap"), **measure_qa(sample, completion, judge)}


def measure_tracking(sample: dict, completion: str, judge: Judge) -> Measured:
    """Where is the object in 8 frames? The mean over all 8, the given one among them, as in VideoChat-R1."""
    truths = true_boxes(sample)
    boxes, reason = read(sample, completion, "answer")
    return {"box_iou": measure(sum(map(box_iou, boxes, truths)) / 8 if boxes else 0.0, reason, "no_overlap")}


def measure_classification(sample: dict, completion: str, judge: Judge) -> Measured:
    """Which label? Equal to the last character: `high quality.` is wrong."""
    truth = true_label(sample)
    label, reason = read(sample, completion, "answer")
    return {"accuracy": measure(float(label == truth), reason, "wrong_label")}


def measure_captioning(sample: dict, completion: str, judge: Judge) -> Measured:
    """Which share of the annotated events does the caption tell, and which share of its sentences is told by them?

    `event_recall` is VideoChat-R1's reward for captions, as published: there a model takes the events from a reference
    caption, and the share is mapped to reward levels that the paper does not give; here the events are annotated and the
    share is the reward. Alone it pays a caption that lists everything that could happen in full, hence the precision.
    """
    events = [composed(event) for event in annotated(sample, "events")]
    caption, reason = read(sample, completion, "answer")
    recall = sum(told(judge, [(event, caption) for event in events])) / len(events) if caption else 0.0
    precision = caption_precision(events, caption, judge) if caption else 0.0
    return {"event_recall": measure(recall, reason, "no_event"), "event_precision": (precision, reason)}


def caption_precision(events: list[str], caption: str, judge: Judge) -> float:
    """The share of the caption's sentences that the annotated events tell, by the judge with its two sides exchanged.

    Dream-1k has a model cut the caption into events first; here a sentence is one, so that a sentence of three true
    things counts as much as a sentence of one false thing. No sentence: 0.

    >>> caption_precision(["A man opens the door", "He takes a cup"], "The man opens a door. A dog barks.", words_judge)
    0.5
    """
    sentences, reference = split_sentences(composed(caption)), composed(as_caption(events))
    return sum(told(judge, [(sentence, reference) for sentence in sentences])) / max(len(sentences), 1)


class Reward(NamedTuple):
    """How a completion of one task is read and measured."""

    blocks: dict[str, Block]  # that the prompt asks for behind the thought, by tag, in their order
    measure: Callable[[dict, str, Judge], Measured]  # (sample, completion, judge) -> all parts but `format`
    # The dual reward: parts that are right or wrong, and parts that are more or less right. `format` belongs to neither
    # and always counts.
    discrete: tuple[str, ...] = ()
    continuous: tuple[str, ...] = ()


REWARDS = {
    "grounding": Reward({"answer": INTERVAL}, measure_grounding, continuous=("temporal_iou",)),
    "moments": Reward({"answer": MOMENTS}, measure_moments, continuous=("temporal_iou",)),
    "qa": Reward({"answer": CHOICE}, measure_qa, discrete=("accuracy",)),
    "gqa": Reward({"answer": CHOICE, "glue": WINDOWS}, measure_gqa, discrete=("accuracy",), continuous=("temporal_iou",)),
    "tracking": Reward({"answer": EIGHT_BOXES}, measure_tracking, continuous=("box_iou",)),
    "classification": Reward({"answer": LABEL}, measure_classification, discrete=("accuracy",)),
    "captioning": Reward({"answer": CAPTION}, measure_captioning, continuous=("event_recall", "event_precision")),
}

# The parts of all tasks, each once.
DISCRETE = tuple(dict.fromkeys(part for reward in REWARDS.values() for part in reward.discrete))
CONTINUOUS = tuple(dict.fromkeys(part for reward in REWARDS.values() for part in reward.continuous))

# Reasons that mean "nobody can tell what was answered"; evaluation counts them as parse failures. An answer that is no
# possible answer at all is among them: a reversed interval is no interval, a letter that is not offered is no choice
# (and in "I do not know" the only capital is no choice either: the two cannot be told apart). The remaining reasons,
# no_overlap, not_in_video, wrong_choice, wrong_label, no_event and bad_format, belong to answers that can be read.
BLOCKS = [(tag, block) for reward in REWARDS.values() for tag, block in reward.blocks.items()]
WHY_UNREADABLE = {f"no_{tag}_tag": f"there is no closed <{tag}> ... </{tag}>" for tag, _ in BLOCKS}
WHY_UNREADABLE |= {reason: words for _, block in BLOCKS for reason, words in block.reasons.items()}
UNREADABLE = frozenset(WHY_UNREADABLE)


def reward_of(task: str) -> Reward:
    return entry_of(REWARDS, task, "REWARDS of rewards.py (how a completion is read and measured)")


# ---- The reward ------------------------------------------------------------------------------------------------------


def score(sample: dict, completion: str, mix: str = "sum", judge: Judge = words_judge) -> Score:
    """The reward of one completion of one sample, for every possible text.

    mix "sum" adds the parts up (VideoChat-R1); "temporal_r1" is 0.5 · task_score + 0.5 · format (Temporal-R1);
    "discrete" and "continuous" leave out one half of the dual reward, to see what it is for. `judge` is asked about
    captions only. A task without a valid truth raises ValueError with the sample's id and the field.

    >>> sample = {"id": "a", "task": "grounding", "spans": [[10, 20]]}
    >>> score(sample, "<think>x</think> <answer>12.00 to 18.00</answer>")
    Score(total=1.6, parts={'temporal_iou': 0.6, 'format': 1.0}, reason='ok')
    >>> score(sample, "<answer>18.00 to 12.00</answer>").reason
    'reversed_interval'
    """
    if mix not in MIXES:
        raise ValueError(f"unknown reward {mix!r}: choose one of {', '.join(MIXES)}")
    reward = reward_of(annotated(sample, "task"))
    measured = reward.measure(sample, completion, judge)
    if measured.keys() != {*reward.discrete, *reward.continuous}:
        raise KeyError(f"task {sample['task']!r} measures {', '.join(measured)}: its entry in REWARDS of rewards.py has to "
                       "name just these, as `discrete` or `continuous`")
    parts = {name: value for name, (value, _) in measured.items()}
    parts["format"] = float(format_is_right(sample, completion))
    # Backwards, so that in gqa the answer's reason comes before the glue's.
    reasons = [reason for _, reason in reversed(measured.values())] + ["ok" if parts["format"] else "bad_format"]
    return Score(mix_parts(parts, mix), parts, first_reason(reasons))


def mix_parts(parts: dict[str, float], mix: str) -> float:
    """The parts as one number, the one that the advantages compare."""
    if mix == "temporal_r1":
        return 0.5 * task_score(parts) + 0.5 * parts["format"]
    left_out = {"sum": (), "videochat_r1": ("event_precision",), "discrete": CONTINUOUS, "continuous": DISCRETE}[mix]
    return sum(value for name, value in parts.items() if name not in left_out)


def task_score(parts: dict[str, float]) -> float:
    """The mean of the parts without `format`: how good the answer is, however it was written down."""
    values = [value for name, value in parts.items() if name != "format"]
    return sum(values) / len(values)


def first_reason(reasons: list[str]) -> str:
    """One reason for the log. What cannot be read comes first, or a wrong letter would hide an unreadable glue."""
    failures = [reason for reason in reasons if reason != "ok"]
    return next((reason for reason in failures if reason in UNREADABLE), failures[0] if failures else "ok")


def format_is_right(sample: dict, completion: str) -> bool:
    """The blocks that were asked for and, where the prompt prescribes their inside as a list, that list.

    A wrong, reversed or disjoint answer keeps its format: what it says is measured by the other parts.
    """
    blocks = reward_of(sample["task"]).blocks
    return (all(block.has_form(last_block(completion, tag)[0] or "") for tag, block in blocks.items())
            and blocks_are_right(completion, [*blocks], thinks=sample.get("think") is not False))


def blocks_are_right(completion: str, tags: list[str], thinks: bool) -> bool:
    """Is the completion exactly the blocks that its prompt asks for, with nothing but white space around them?

    A prompt without thinking (`"think": false` in the sample) asks for no thought, so there one is as wrong as its
    absence is elsewhere. No tag of a block may occur twice: with two answers in one completion the model could hedge.
    Other tags, such as the <timestep> that VideoChat-R1 asks for inside the thought, may occur there at will.
    """
    # Counting first keeps the lazy dots below linear: every tag has one place at most where it can match.
    once = {"think", "answer", "glue", *tags}
    if any(completion.count(tag) > 1 for name in once for tag in (f"<{name}>", f"</{name}>")):
        return False
    if not thinks and ("<think>" in completion or "</think>" in completion):
        return False
    pattern = r"\s*+".join(f"<{name}>.*?</{name}>" for name in ["think"] * thinks + tags)
    return re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None


# ---- python rewards.py completions.jsonl -----------------------------------------------------------------------------


def score_line(line: bytes, mix: str) -> dict:
    """One line of input, a sample with a "completion", to one object of output; ValueError if it is no such line."""
    try:
        sample = json.loads(line.decode("utf-8-sig"))  # -sig: files written on Windows may begin with a mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from None
    if not isinstance(sample, dict):
        raise ValueError(f"a line must be a JSON object, not {reprlib.repr(sample)}")
    for field in ("id", "completion"):
        if not isinstance(sample.get(field), str):
            raise ValueError(f"sample {reprlib.repr(sample.get('id'))}: field {field!r} must be a string")
    result = score(sample, sample["completion"], mix)
    return {"id": sample["id"], "reward": result.total, "parts": result.parts, "reason": result.reason}


def score_lines(lines: BinaryIO, mix: str) -> Iterator[dict]:
    # A binary file ends its lines at \n only; as text it would also split inside strings, at U+2028 for example.
    for number, line in enumerate(lines, start=1):
        try:
            yield score_line(line, mix)
        except ValueError as error:
            yield {"id": None, "error": f"line {number}: {error}"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Score completions: one JSON object in, one out, for every line.")
    parser.add_argument("completions", help='a file of samples with a "completion" each, or - for standard input')
    parser.add_argument("--reward", choices=MIXES, default="sum",
                        help="sum of the parts; half the mean of the others plus half the format; or the sum of format "
                             "and one half of the dual reward (default: sum)")
    args = parser.parse_args()
    try:
        lines = sys.stdin.buffer if args.completions == "-" else open(args.completions, "rb")
    except OSError as error:
        parser.error(f"cannot read {args.completions}: {error.strerror}")
    failed = False
    with lines:
        for result in score_lines(lines, args.reward):
            failed |= "error" in result
            # Half of a surrogate pair has no UTF-8 form; backslashreplace turns it into the JSON escape it came from.
            text = json.dumps(result, ensure_ascii=False).encode("utf-8", "backslashreplace")
            sys.stdout.buffer.write(text + b"\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
