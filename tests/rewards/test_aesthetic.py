"""Where heads of the aesthetic predictor come from, and where they are kept."""

from pathlib import Path

import torch

from stitchvm.rewards import aesthetic
from stitchvm.rewards.aesthetic import AestheticReward
from tests.rewards import tiny


def test_heads_of_one_name_are_kept_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("STITCHVM_CACHE", str(tmp_path / "cache"))
    folder = tiny.clip_folder(tmp_path / "clip")

    def download(url, path, *_, **__):
        tiny.head_file(Path(path), seed=int(url.split("/")[-2]))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    heads = [
        AestheticReward(folder, head=f"https://x.org/{seed}/my%2Bhead.pth").head.state_dict()
        for seed in (1, 2, 1)
    ]
    for key, value in heads[0].items():
        assert torch.equal(value, heads[2][key]) and not torch.equal(value, heads[1][key])
    assert len(list((tmp_path / "cache").glob("*-my+head.pth"))) == 2


def test_of_a_folder_on_the_hub_only_the_head_is_asked_for(monkeypatch, tmp_path):
    tiny.head_file(tmp_path / "aesthetic.pth")
    asked = []

    def resolve(name, **options):
        asked.append((name, options))
        return tmp_path

    monkeypatch.setattr(aesthetic, "resolve", resolve)
    assert aesthetic._head_file("hf-hub:org/name", None) == tmp_path / "aesthetic.pth"
    assert asked == [("org/name", {"allow_patterns": ["aesthetic.pth"]})]


def test_the_published_head_keeps_its_name_where_contents_are_not_compared(monkeypatch) -> None:
    """The rehearsal compares none, and has put random weights there."""
    before = aesthetic.downloaded_head(aesthetic.HEAD)
    monkeypatch.setattr(aesthetic, "SHA256", {})
    assert aesthetic.downloaded_head(aesthetic.HEAD) == before
