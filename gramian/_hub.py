"""Check that there is a model of a name, before packages that take seconds are imported."""

from __future__ import annotations

from pathlib import Path

from gramian._extras import require

__all__ = ["check_model_exists"]

_TIMEOUT = 5.0  # seconds


def check_model_exists(name: str | Path) -> None:
    """Raise an error unless a name is that of a folder or file, or of a model on the Hub.

    The Hub is asked once, and only for a name such as "gpt2" or "owner/name" that is not in the
    cache. Other answers of the Hub, such as that one has to log in, are left to those who load the
    model.

    Args:
        name: The path of a folder or file, or the name of a model on the Hub.

    Raises:
        FileNotFoundError: if there is no such model, or if the Hub cannot be reached.
        ImportError: if huggingface_hub is not installed.
    """
    if Path(name).exists():
        return
    require("a model of the Hub", "models", "huggingface_hub")
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    missing = f"there is no model {name}: no folder or file has this path"
    text = str(name)
    if isinstance(name, Path) or text.endswith(".gguf"):
        raise FileNotFoundError(f"{missing}.")
    try:
        if isinstance(try_to_load_from_cache(text, "config.json"), str):
            return
        HfApi().model_info(text, timeout=_TIMEOUT)
    except HFValidationError:
        raise FileNotFoundError(f"{missing}.") from None
    except GatedRepoError:
        return
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{missing}, and the Hub has none of this name.") from None
    except HfHubHTTPError:
        return
    except Exception as error:
        raise FileNotFoundError(f"{missing}, and the Hub cannot be reached.") from error
