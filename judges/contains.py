"""`--answers contains`: does the answer stand in the response, as whole words, ignoring case?

Right is also what the rule `text` calls right.
"""

import re

from judges import text


def is_correct(response: str, answer: str):
    """An empty answer is never right."""
    words = text.plain(text.gold(answer)).split()
    pattern = r"\s+".join(map(re.escape, words))
    whole = rf"(?<![\w.,/^:{{-]){pattern}(?!\w|[.,:/^]\w)"
    is_there = words and re.search(whole, text.plain(response), re.IGNORECASE)
    return bool(is_there) or text.is_correct(response, answer)
