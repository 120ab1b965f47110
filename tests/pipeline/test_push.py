"""A written directory is uploaded whole, after it has been checked; a hub that refuses leaves it in place."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from tests.support.families import fresh_named
from tests.support.tokenizers import byte_tokenizer


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(("create", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
        return SimpleNamespace(commit_url="https://huggingface.co/me/small/commit/1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return calls


def test_what_is_written_is_uploaded_whole(hub, tmp_path):
    folder = hk.save(fresh_named("llama"), byte_tokenizer(), tmp_path / "small", push_to_hub="small")
    written = sorted(path.name for path in folder.iterdir())
    assert {"README.md", "config.json", "hywia.json", "model.safetensors", "tokenizer.json"} <= set(written)
    assert hub == [("create", "small", {"private": True, "exist_ok": True}), ("upload", "me/small", written)]


def test_no_name_of_a_repository_is_refused_before_anything_is_written(hub, tmp_path):
    for name in ("a/b/c", "../x", 3):
        with pytest.raises(UsageError, match=r"push_to_hub: expected a repository's name such as you/model, got"):
            hk.save(fresh_named("llama"), None, tmp_path / "small", push_to_hub=name)
    assert hub == []
    assert not (tmp_path / "small").exists()


def test_a_refused_upload_leaves_the_directory(hub, tmp_path, monkeypatch):
    def refuse(self, **_):
        raise OSError("401 Client Error")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    with pytest.raises(HywiaError, match=r"is written, but could not be uploaded to me/x \(401 Client Error\); log in"):
        hk.save(fresh_named("llama"), None, tmp_path / "small", push_to_hub="me/x")
    assert (tmp_path / "small" / "model.safetensors").stat().st_size > 0
