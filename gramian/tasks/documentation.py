"""Provide English text that ships with Python: the documentation that `help()` shows.

Many paragraphs of the text occur several times. Only the first occurrence of a paragraph is kept.
Otherwise, much of the held-out text would also occur, word for word, in the training part.
"""

from __future__ import annotations

from importlib import import_module

__all__ = ["python_topics"]


def python_topics() -> list[str]:
    """Return the texts of all topics, in order, without repeated paragraphs.

    If all paragraphs of a topic occur in earlier topics, the topic is left out.

    Raises:
        RuntimeError: if this Python was installed without `pydoc_data`.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise RuntimeError(
            "this Python was installed without the text behind help() (pydoc_data)."
        ) from error
    seen: set[str] = set()
    texts = []
    for topic in topics.values():
        paragraphs = []
        for paragraph in topic.strip("\n").split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        if paragraphs:
            texts.append("\n\n".join(paragraphs))
    return texts
