"""What stands in cells of someone's spreadsheet that is no plain text to learn: markup, addresses, placeholders, broken letters."""
from __future__ import annotations

import html.entities
import re
import unicodedata

_TAGS = ("a abbr b big blockquote body br center code col dd del div dl dt em font h1 h2 h3 h4 h5 h6 head hr html i iframe img input ins "
         "kbd li link mark meta ol p pre q s script small span strike strong style sub sup table tbody td tfoot th thead title tr tt u ul "
         "video").split()
_TAG = re.compile(rf"</?(?:{'|'.join(_TAGS)})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(#\d{1,7};|#x[0-9a-f]{1,6};|[a-z][a-z0-9]{1,31};)", re.IGNORECASE)
_TABLE = re.compile(r"^[ \t]{0,9}(?=[^\n]*\|)\|?[ \t]{0,99}:?-{3,999}:?[ \t]{0,99}(?:\|[-: \t]*)*$", re.MULTILINE)
_WEB = re.compile(r"\bhttps?://\S|\bwww\.\w", re.IGNORECASE)
_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}\.\w")
# A telephone number begins with +, 0 or (0, or has the American groups of 3, 3 and 4; a date or a decimal fraction may begin with 0 too.
_PHONE = re.compile(r"(?<![\w.,/-])(?:\+\d|\(?0\d)[\d ()/.-]{5,20}\d(?!\w)|"
                    r"(?<![\w.-])(?:1[-. ])?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w-])")
_DATES = re.compile(r"\d{1,2}[./-]\d{1,2}[./-]\d{2,4}|0\.\d+|0[\d.]*")
_DIGITS = range(7, 16)
# The two bytes of an accented letter or of a quote read as two characters, or the mark of one that was lost.
_GARBLED = re.compile("[\u00c2\u00c3][\u0080-\u00bf\u0152-\u0178\u2018-\u203a\u20ac\u2122]|\u00e2\u20ac|\ufffd")
_PLACEHOLDERS = frozenset((
    "n/a", "n.a", "n. a", "nan", "null", "tbd", "tba", "tbc", "todo", "to do", "to be done", "to be defined", "to be written", "xxx",
    "see above", "see below", "as above", "same as above", "ditto", "placeholder", "wip", "pending", "siehe oben", "siehe unten", "s. o",
    "s.o", "s. u", "s.u", "wie oben", "dito", "folgt", "folgt noch", "k. a", "k.a", "keine angabe", "voir ci-dessus", "voir plus haut",
    "à compléter", "idem", "véase arriba", "ver arriba", "pendiente", "vedi sopra", "da definire", "zie boven", "ver acima", "см. выше",
    "同上", "#n/a", "#ref!", "#value!", "#name?", "#div/0!", "#null!", "#num!", "#nv", "#bezug!", "#wert!"))
# So a text may begin that says nothing else: with a few words (see above, question 3), or a note to oneself (TODO: ask).
_BEGINNING = re.compile(r"(?:see above|see below|as above|siehe oben|siehe unten|voir ci-dessus|véase arriba|vedi sopra|zie boven)"
                        r"(?:\W+\w+){0,2}\W*|(?:todo|tbd|tba)\b\W.{0,80}|lorem ipsum\b.*", re.DOTALL)


def has_markup(text: str) -> bool:
    """Whether there is an HTML tag or entity. Other things in angle brackets, such as <name> or List<int>, are none."""
    return "<" in text and bool(_TAG.search(text)) or "&" in text and any(
        found.startswith("#") or found in html.entities.html5 for found in _ENTITY.findall(text))


def has_table(text: str) -> bool:
    """Whether there is a Markdown table: a line of dashes between bars."""
    return "|" in text and "---" in text and bool(_TABLE.search(text))


def has_web_address(text: str) -> bool:
    """Whether there is a web address, with its scheme or with www."""
    return bool(_WEB.search(text))


def has_mail_address(text: str) -> bool:
    """Whether there is an e-mail address."""
    return "@" in text and bool(_MAIL.search(text))


def has_phone(text: str) -> bool:
    """Whether there is what looks like a telephone number: 7 to 15 digits with an area code, and no date."""
    for found in _PHONE.finditer(text):
        number = found[0]
        if sum(c.isdigit() for c in number) in _DIGITS and not _DATES.fullmatch(number.strip("()")):
            return True
    return False


def is_garbled(text: str) -> bool:
    """Whether letters were decoded wrongly before: Ã¤ for ä, â€™ for an apostrophe, or the replacement character."""
    return not text.isascii() and bool(_GARBLED.search(text))


def is_placeholder(text: str) -> bool:
    """Whether a text only stands for one: n/a, TODO, "see above" in some languages, an error of a spreadsheet, only dots, dashes or ###."""
    if len(text) > 200 and not text.casefold().startswith("lorem"):
        return False
    plain = " ".join(text.split()).casefold().strip("()[]<>{}*\"'„“”‚‘’ ")
    return (all(unicodedata.category(c).startswith("P") or c in "~ " for c in plain) or plain in _PLACEHOLDERS
            or plain.rstrip(".…!:") in _PLACEHOLDERS or bool(_BEGINNING.fullmatch(plain)))
