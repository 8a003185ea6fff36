"""`--answers text`: does a response conclude what the answer says, as numbers or else as text?

Taken out of a response, without its thoughts, is in this order: the last \\boxed{...}, what follows
the last ####, what follows the last "answer is" or "answer:", the last number. A fraction, a power,
a clock time, a tuple or a mixed number is one value: no number is taken out of its middle, nor out
of a term. Wrappers such as `$...$`, \\text{...} or a currency sign come off both sides. A unit
counts only if both sides have one. In doubt a response is wrong.
"""

import re
from contextlib import suppress
from fractions import Fraction

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
# Unsigned: 1,234.5, .5, 2e3.
NUMBER = rf"(?:{DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?"
# A minus after a digit, a letter or a bracket is no sign. After = it may stand apart.
SIGN = r"(?:(?<![\w)\]}])-|(?<== )- )?"
# What stands for one value: the longest first. `text`: a clock time or ratio, a tuple or set.
VALUE = re.compile(
    rf"(?P<text>\d+(?:(?: : |:)\d+)+|\\?[(\[{{]-?{NUMBER}(?:, ?(?!\d{{3}}\b)-?{NUMBER})+\\?[)\]}}])"
    rf"|(?P<sign>{SIGN})(?:"
    rf"(?:(?P<whole>\d+) )?(?P<numerator>{NUMBER}) ?/ ?(?P<denominator>{NUMBER})"
    rf"|(?P<factor>{NUMBER}) ?[*×x] ?10\^(?P<exponent>-?\d{{1,3}})"
    rf"|(?P<base>{NUMBER})\^(?P<power>\d{{1,2}})"
    rf"|(?P<number>{NUMBER}))"
)
# Words that change a number, where a unit may stand.
CHANGES = r"(?i:hundred|thousand|million|billion|trillion|dozen|(?:pi|sqrt|squared|cubed)\b)"
# What a value stands beside when it is a part of something longer: an operator, an index, a root, a
# bracket after a name, a variable.
BEFORE = re.compile(r"[_^/:√±{]-?$|[A-Za-z\d^)][(\[]?$|[\w)\]}] ?[-+*/×÷^] ?$|\d : $|\\pm $")
AFTER = re.compile(
    rf" ?(?:[-+](?=[ \w(])|[*/×÷^\\π√]|{CHANGES})|:\w|[(½¼¾²³¹⁰-⁹]|\)[\^(]"
    r"|[A-Za-z](?:\b|\d)"
)
UNIT = re.compile(
    rf"(?!.*{CHANGES})(?:(?P<words>(?: |[A-Za-z](?=[A-Za-z]))[A-Za-z][A-Za-z /]*)(?:\^\d|[²³])?)?"
)
# What LaTeX and Markdown write, and what it means here.
PLAIN = (
    (r"(?m)^\s*[-*•] +", " "),  # an item of a list
    (r"(?<=\d)\*\*(?=\d)", "^"),
    (r"(?<=\d) ?(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac ?\{([^{}+-]+|-?[\d.,]+)\} ?\{([\d.,]+|\w)\}", r"\1/\2"),
    (r"\\[dt]?frac ?(\d) ?(\d)", r"\1/\2"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}", r" \1"),
    (r"\\(?:left|right|displaystyle)\b|\\[!;]|\\?[$€£¥]|\*\*|~|\\[()\[\]]", ""),
    (r"(\d)(?:\{,\}|\\,)(?=\d{3})", r"\1,"),
    (r"\\,|\\ |\\quad\b", " "),
    (r"\\(?:times|cdot)\b|[·⋅]", "*"),
    (r"[⁄∕]", "/"),
    (r"∶", ":"),
    (r"\\?[%°]|\^\{?\\circ\}?", ""),
    (r"\^\{(-?\d+)\}", r"^\1"),
    ("[\N{MINUS SIGN}\N{EN DASH}]", "-"),
    (r"(?i)\b(?:negative|minus) (?=\d)", "-"),
)
HEDGES = r"(?i)^(?:(?:the|option|choice|about|approximately|roughly|exactly|equal to) )+"
# The left side of an equation whose right side is the value: x = 5, f(x) = 5, 2 + 3 = 5.
LEFT = r"^(?:[A-Za-z]\w?(?:\(\w\))?|[-\d\s+*/().,^×÷]+) ?(?:=|\\in\b) ?"


def is_correct(response: str, answer: str):
    """An empty answer is never right.

    >>> is_correct("So it is \\\\boxed{1{,}234}.", "1234")
    True
    """
    response, answer = response.rpartition("</think>")[2].strip(), answer.strip()
    wanted, units = value_of(gold(answer))
    found = conclusion(response)
    if isinstance(wanted, str) and re.fullmatch("[a-z]|yes|no|true|false", wanted):
        found = choice(plain(stated(response) or response)) or found
    value, others = value_of(found)
    is_same = value == wanted != "" and (not units or not others or bool(units & others))
    return bool(answer) and (response == answer or is_same)


def gold(answer: str):
    """What a reference answer says: what follows its ####, or else all of it."""
    return stated(answer) or answer


# ---- what a text concludes --------------------------------------------------------------------


def conclusion(response: str):
    """The part of a response that is its answer."""
    found = stated(response)
    if found is None:
        text = plain(response)
        found = ([match[0] for match in VALUE.finditer(text) if is_whole(match)] or [text])[-1]
    return found


def stated(text: str):
    """What a text marks as its answer. None if it marks nothing."""
    box = last_box(text)
    if box is not None:
        return box
    marked = re.findall(r"(?i)####[^\S\n]*(?:(?:final )?answer:?\s*)?(.*)", text)
    if not marked:  # up to the end of the sentence, or of the clause
        clause = r"(\S.*?)(?=[.!;](?:\s|$)|, [A-Za-z]| because|$)"
        marked = re.findall(rf"(?im)(?:answer|choice|option)(?: is|:)[:\s]*{clause}", text)
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


def choice(text: str):
    """The letter of "(B) Paris", "B. Paris" or "B) Paris"; the first word of "Yes, it is"."""
    letter = re.match(r"(?:option |choice )?\(?([A-Z])(?:[.:)](?: |$)|$)", text)
    word = re.match(r"(?i)\W*(yes|no|true|false)\b", text)
    return letter[1] if letter else word and word[1]


def is_whole(match):
    """Not a part of something longer?"""
    text, start, end = match.string, *match.span()
    return not BEFORE.search(text[max(0, start - 4) : start]) and not AFTER.match(text, end)


# ---- what a conclusion is worth ---------------------------------------------------------------


def plain(text: str):
    """A text without the wrappers of LaTeX and Markdown."""
    for pattern, meaning in PLAIN:
        text = re.sub(pattern, meaning, text)
    return " ".join(text.split())


def value_of(text: str):
    """(a Fraction, the words of its unit) or else (text without case and white space, nothing)."""
    text = re.sub(r"^\s*- (?=\d)", "-", text)  # no item of a list
    text = plain(text).lstrip(" ,;:'\"[`*").rstrip(" .,;:'\"]`*")
    text = re.sub(r"^\(([^(),]+)\)$", r"\1", text)  # (B)
    text = re.sub(LEFT, "", re.sub(HEDGES, "", text))
    match = VALUE.match(text)
    unit = match and not match["text"] and UNIT.fullmatch(match.string, match.end())
    if unit:
        words = (unit["words"] or "").casefold().split()
        return number(match), {word.removesuffix("s") for word in words}
    return re.sub(r"\s", "", text).casefold(), set()


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
