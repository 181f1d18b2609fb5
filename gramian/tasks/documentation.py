"""Real English that every Python carries: the reference documentation behind `help()`.

The text quotes itself at length, so every paragraph is kept at its first occurrence only:
otherwise a good part of the held-out bytes would stand word for word in the training part.
"""

from __future__ import annotations

from importlib import import_module

__all__ = ["python_topics"]


def python_topics() -> list[str]:
    """Every topic's text in order, each paragraph once; topics with nothing new are left out.

    Raises:
        RuntimeError: this Python was installed without `pydoc_data`.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise RuntimeError(
            "This Python was installed without the text behind help() (pydoc_data)."
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
