"""`--answers text`: does a response conclude what the answer says, as numbers or else as text?

Taken out of a response is, in this order: the last \\boxed{...}, what follows the last ####, what
follows the last "answer is" or "answer:", the last number. A fraction, a power, a clock time or a
mixed number is one value: no number is taken out of its middle. Wrappers such as `$...$`,
\\text{...}, a currency sign or a unit come off both sides.
"""

import re
from contextlib import suppress
from fractions import Fraction

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
# Unsigned: 1,234.5, .5, 2e3.
NUMBER = rf"(?:{DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?"
# A minus after a digit, a letter or a bracket is no sign. After = it may stand apart.
SIGN = r"(?:(?<![\w)\]}])-|(?<== )- )?"
# What stands for one value: the longest first.
VALUE = re.compile(
    rf"(?P<text>\d+(?::\d+)+|\(-?{NUMBER}(?:, ?(?!\d{{3}}\b)-?{NUMBER})+\))"  # a time, a tuple
    rf"|(?P<sign>{SIGN})(?:"
    rf"(?:(?P<whole>\d+) )?(?P<numerator>{NUMBER}) ?/ ?(?P<denominator>{NUMBER})"
    rf"|(?P<factor>{NUMBER}) ?[*×x] ?10\^(?P<exponent>-?\d{{1,3}})"
    rf"|(?P<base>{NUMBER})\^(?P<power>\d{{1,2}})"
    rf"|(?P<number>{NUMBER}))"
)
OPERAND_BEFORE = re.compile(r"[\^_/:√{]-?$|[A-Za-z]\(?$|[\w)\]}] ?[-+*×÷] ?$")
MANY = r"(?:hundred|thousand|million|billion|trillion|dozen)"  # no units
OPERAND_AFTER = re.compile(rf" ?(?:[+*×÷^/\\π√]|-(?=[ \w])|{MANY})|:\w")
UNIT = re.compile(rf"(?: ?(?!.*{MANY})[A-Za-z][A-Za-z /]*)?(?:\^\d)?")
# What LaTeX and Markdown write, and what it means here.
PLAIN = (
    (r"(?<=\d)\*\*(?=\d)", "^"),
    (r"(?<=\d) ?(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"\1/\2"),
    (r"\\[dt]?frac ?(\d) ?(\d)", r"\1/\2"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}", r" \1"),
    (r"\\(?:left|right|displaystyle)\b|\\[!;]|\\?\$|\*\*|~|\\[()\[\]]", ""),
    (r"(\d)(?:\{,\}|\\,)(?=\d{3})", r"\1,"),
    (r"\\,|\\ |\\quad\b", " "),
    (r"\\(?:times|cdot)\b", "*"),
    (r"\\?[%°]|\^\{?\\circ\}?", ""),
    (r"\^\{(-?\d+)\}", r"^\1"),
    ("[\N{MINUS SIGN}\N{EN DASH}]", "-"),
)


def is_correct(response: str, answer: str):
    """An empty answer is never right.

    >>> is_correct("So it is \\boxed{1{,}234}.", "1234")
    True
    """
    response, answer = response.strip(), answer.strip()
    wanted = value_of(gold(answer))
    found = conclusion(response)
    if re.fullmatch("[a-z]", str(wanted)):  # a choice: (B) Paris, B. Paris, B) Paris
        found = re.sub(r"^\(?([A-Z])[.:)](?: .*)?$", r"\1", plain(found))
    return bool(answer) and (response == answer or value_of(found) == wanted)


def gold(answer: str):
    """What a reference answer says: what follows its ####, or else all of it."""
    return stated(answer) or answer


# ---- what a text concludes --------------------------------------------------------------------


def conclusion(response: str):
    """The part of a response that is its answer."""
    found = stated(response)
    if found is None:
        text = plain(response)
        values = [match[0] for match in VALUE.finditer(text) if is_whole(match)]
        values += [] if values else re.findall(r"(?i)^\W*(yes|no|true|false)\b", text)
        found = (values or [text])[-1]
    return found


def stated(text: str):
    """What a text marks as its answer. None if it marks nothing."""
    box = last_box(text)
    if box is not None:
        return box
    marked = re.findall(r"####(.*)", text)
    if not marked:  # up to the end of the sentence, or of the clause
        clause = r"(.+?)(?=[.!;](?:\s|$)|, [A-Za-z]| because|$)"
        marked = re.findall(rf"(?im)(?:answer|choice|option)(?: is|:)[: ]*{clause}", text)
    return marked[-1] if marked else None


def last_box(text: str):
    """What stands in the last \\boxed{...}, innermost, however deep its braces go."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        return re.match(r"\S*", rest)[0]
    depth = 0
    for match in re.finditer(r"\\?[{}]", rest):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # an escaped brace is text
        if depth == 0:
            return rest[1 : match.start()]
    return rest[1:]  # cut before the brace was closed


def is_whole(match):
    """Not a part of something longer: an operand, an exponent of a unit, an index."""
    text, start, end = match.string, *match.span()
    before = text[max(0, start - 4) : start]
    return not OPERAND_BEFORE.search(before) and not OPERAND_AFTER.match(text, end)


# ---- what a conclusion is worth ---------------------------------------------------------------


def plain(text: str):
    """A text without the wrappers of LaTeX and Markdown."""
    for pattern, meaning in PLAIN:
        text = re.sub(pattern, meaning, text)
    return " ".join(text.split())


def value_of(text: str):
    """A conclusion as a Fraction, or else as text without case, white space and brackets."""
    text = plain(text).lstrip(" ,;:'\"[`*").rstrip(" .,;:'\"]`*")
    text = re.sub(r"^\(([^(),]+)\)$", r"\1", text)  # (B)
    text = re.sub(r"^[A-Za-z] ?(?:=|\\in\b) ?", "", text)  # x = 5
    match = VALUE.match(re.sub(r"^- (?=\d)", "-", text))
    if match and not match["text"] and UNIT.fullmatch(match.string, match.end()):
        return number(match)
    return re.sub(r"\s", "", text).casefold()


def number(match):
    """A match of VALUE as a Fraction. What is too long for a number stays text."""
    part = {key: found and re.sub("[, ]", "", found) for key, found in match.groupdict().items()}
    with suppress(ValueError, ZeroDivisionError):
        if part["denominator"]:
            value = Fraction(part["numerator"]) / Fraction(part["denominator"])
            value += int(part["whole"] or 0)
        elif part["factor"]:
            value = Fraction(part["factor"]) * Fraction(10) ** int(part["exponent"])
        elif part["base"]:
            value = Fraction(part["base"]) ** int(part["power"])
        else:
            value = Fraction(part["number"])
        return -value if part["sign"] else value
    return match[0]
