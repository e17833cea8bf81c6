"""Files of the hub that timm's published weights are on: from its local cache, else fetched."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from deepclust.errors import CheckpointError

_REPLY_SECONDS = 5.0


def fetch(repository: str, name: str) -> Path:
    """A file of a repository, such as `owner/name` or `owner/name@revision`.

    The hub's own settings hold, such as `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HUB_CACHE` and proxies.

    Raises:
        CheckpointError: If the file is not in the cache and the hub does not offer it within five seconds.
    """
    import huggingface_hub

    repo, _, revision = repository.partition("@")
    place: dict[str, Any] = {"repo_id": repo, "filename": name, "revision": revision or None}
    try:
        return Path(huggingface_hub.hf_hub_download(**place, local_files_only=True))
    except Exception:  # not in the cache, whatever the client calls that
        pass
    # The client itself tries again and again for half a minute where there is no network.
    if (error := _refusal(huggingface_hub.hf_hub_url(**place))) is None:
        try:
            return Path(huggingface_hub.hf_hub_download(**place))
        except Exception as raised:  # of the hub's client, of its HTTP library or of the system
            error = raised
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
        f"can not fetch {name} of {repo} ({reason}); fetch it where there is a network, `hf download {repo} {name} "
        "--local-dir .`, and name it beside this backbone: `weights: FILE.safetensors, sha256: …`"
    ) from error


def _refusal(url: str) -> Exception | None:
    """Why the hub does not offer a file; None if it does."""
    import huggingface_hub

    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            huggingface_hub.get_hf_file_metadata(url, timeout=_REPLY_SECONDS)
            answers.append(None)
        except Exception as error:  # as above
            answers.append(error)

    # A thread, as nothing else bounds how long names are looked up.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_REPLY_SECONDS)
    return answers[0] if answers else TimeoutError(f"no answer within {_REPLY_SECONDS:g} seconds")
