"""Models that do not exist are named at once, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub as hub
from huggingface_hub import errors

from gramian._hub import check_model_exists


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names about which the Hub is asked; it answers with the last of its errors."""
    names: list[str] = []
    monkeypatch.setattr(hub.HfApi, "model_info", lambda self, name, **_: names.append(name))
    return names


def answer(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    def info(*_: Any, **__: Any) -> None:
        if issubclass(kind, errors.HfHubHTTPError):
            raise kind("no", response=mock.MagicMock())
        raise kind("no")

    monkeypatch.setattr(hub.HfApi, "model_info", info)


@pytest.mark.parametrize(
    "name", ["./nowhere", "../a/b", "/no/where", "a/b/c", "no.gguf", Path("nowhere"), "~/a", "a b"]
)
def test_paths_are_not_asked_for(name: Any, asked: list[str]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        check_model_exists(name)
    assert str(caught.value) == f"there is no model {name}: no folder or file has this path."
    assert asked == []


def test_what_is_there_is_not_asked_for(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_model_exists(tmp_path)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    check_model_exists("owner/cached")
    assert asked == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, ", and the Hub has none of this name."),
        (ConnectionError, ", and the Hub cannot be reached."),
        (TimeoutError, ", and the Hub cannot be reached."),
        (errors.OfflineModeIsEnabled, ", and the Hub cannot be reached."),
        (errors.GatedRepoError, None),
        (errors.HfHubHTTPError, None),
    ],
)
def test_the_hub_is_asked_once(
    kind: Any, message: str | None, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_model_exists("owner/there")
    assert asked == ["owner/there"]
    answer(monkeypatch, kind)
    if message is None:
        check_model_exists("owner/nowhere")
        return
    with pytest.raises(FileNotFoundError) as caught:
        check_model_exists("owner/nowhere")
    text = "there is no model owner/nowhere: no folder or file has this path"
    assert str(caught.value) == text + message
