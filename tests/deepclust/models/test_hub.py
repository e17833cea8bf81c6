"""Published weights come from the hub's cache, or from the hub; where it does not answer, that is said at once."""

import socket
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from deepclust.errors import CheckpointError
from deepclust.models import hub

REMEDY = r"fetch it where .*, `hf download timm/net\.tag model\.safetensors --.*`, .*`weights: FILE.*, sha256: …`$"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_REPLY_SECONDS", 0.5)
    return tmp_path


def asks(monkeypatch, url):
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda **place: url)


def test_a_file_in_the_hubs_cache_is_taken_without_a_network(cache, monkeypatch):
    monkeypatch.delattr(socket, "getaddrinfo")
    repository = cache / "models--timm--net.tag"
    file = repository / "snapshots" / ("a" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert hub.fetch("timm/net.tag", "model.safetensors").read_bytes() == b"weights"
    assert hub.fetch(f"timm/net.tag@{'a' * 40}", "model.safetensors") == file


@pytest.mark.parametrize(("listens", "reason"), [(False, "refused|unreachable"), (True, r"timed out|within 0\.5 sec")])
def test_a_hub_that_does_not_answer_is_one_line_at_once_that_says_how_to_fetch_and_name_the_file(
    monkeypatch, listens, reason
):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/model.safetensors"
        if not listens:
            server.close()
        asks(monkeypatch, url)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"can not fetch .* of timm/net\.tag \(.*({reason}).*\); {REMEDY}"):
            hub.fetch("timm/net.tag", "model.safetensors")
        assert time.monotonic() - start < 3


def test_names_that_nobody_looks_up_do_not_hold_up_either(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **options: time.sleep(5))
    asks(monkeypatch, "http://hub.invalid/model.safetensors")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"no answer within 0\.5 seconds"):
        hub.fetch("timm/net.tag", "model.safetensors")
    assert time.monotonic() - start < 3


def test_where_the_hub_may_not_be_asked_nobody_does(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        hub.fetch("timm/net.tag", "model.safetensors")
