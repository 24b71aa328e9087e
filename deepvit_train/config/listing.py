"""Read lists of texts as they are typed, without quotes within quotes."""

from __future__ import annotations

BRACKETS = {"(": ")", "[": "]", "{": "}"}


def parts(text: str, separator: str) -> list[str]:
    """Part a text at each separator that stands outside brackets and quotes. Empty parts are left out.

    The separator is one character; a space stands for any white space.

    Raises ValueError where a bracket or a quote is not closed.
    """
    found, begun, closing = [""], "", []
    for letter in text:
        if begun:
            begun = "" if letter == begun else begun
        elif letter in "'\"":
            begun = letter
        elif letter in BRACKETS:
            closing.append(BRACKETS[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        if not (begun or closing) and (letter.isspace() if separator == " " else letter == separator):
            found.append("")
        else:
            found[-1] += letter
    if begun or closing:
        raise ValueError(f"{begun or closing[-1]} is missing")
    return [each.strip() for each in found if each.strip()]


def typed_list(text: str) -> list[str] | None:
    """Return the texts of a list as it is typed, `[a=1,b=[2,3]]`, without quotes around them.

    Returns None for what is no list.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        return [_unquoted(each) for each in parts(text[1:-1], ",")]
    except ValueError:
        return None


def _unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
    return text[1:-1] if is_quoted else text
