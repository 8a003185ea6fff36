"""`--answers math`: is the response equal to the answer, by the library math-verify?

Right is also what the rule `text` calls right.
"""

from judges import text

try:
    from math_verify import parse, verify
except ImportError:
    raise ImportError("it needs a library: pip install math-verify") from None


def is_correct(response: str, answer: str):
    """An empty answer is never right."""
    if not answer.strip() or text.is_correct(response, answer):
        return bool(answer.strip())
    gold = parse(f"${text.plain(text.gold(answer))}$")
    return bool(gold) and verify(gold, parse(response))
