"""Names that may hold anything, on one printable line."""

MAX_NAME_CHARACTERS = 4096  # the longest path of Linux; a tar header can hold megabytes


def show(text: str, max_characters: int = MAX_NAME_CHARACTERS) -> str:
    """The text on one line: what is not printable is escaped, what is too long is cut."""
    if len(text) > max_characters:
        text = text[: max_characters - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
