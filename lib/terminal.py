"""What is printed: text from outside cannot act on the terminal, and errors do not stand behind a progress bar."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

# Control characters, halves of surrogate pairs, and what breaks a line; and those that turn the direction of the text.
ACTING = ("Cc", "Cs", "Zl", "Zp")
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: object, keep: str = "") -> str:
    """`text` with characters that act shown as Python escapes them: a question or a completion could otherwise change the
    title of the window, and a file's name could forge a line of the log. `keep`: characters that may stay.

    >>> printable("a\\x1b[31m b\\nc"), printable("a\\nb", keep="\\n")
    ('a\\\\x1b[31m b\\\\nc', 'a\\nb')
    """
    return "".join(repr(c)[1:-1] if c not in keep and (unicodedata.category(c) in ACTING or c in TURNING) else c
                   for c in str(text))


@contextmanager
def errors_in_one_sentence(*kinds: type[Exception]) -> Iterator[None]:
    """Around a whole program: a wrong value or file (ValueError, OSError, or one of `kinds`), named in the message, ends it
    with exit status 1 and that message. It stands on a line of its own, for a bar that is open is closed first; so does the
    message of a SystemExit from further inside."""
    try:
        yield
    except SystemExit as end:
        close_bars()
        raise SystemExit(printable(end.code, keep="\n") if isinstance(end.code, str) else end.code) from None
    except KeyboardInterrupt:  # whoever pressed Ctrl-C knows why
        close_bars()
        raise SystemExit(130) from None
    except (ValueError, OSError, *kinds) as error:
        close_bars()
        raise SystemExit(f"error: {printable(error, keep=chr(10))}") from error


def close_bars() -> None:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
