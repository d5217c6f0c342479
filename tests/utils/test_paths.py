"""Names of files and folders, and what is left of them in a folder that others read."""

import pytest

from polymodal.utils.paths import full_names, without_places


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/runs/final", "final"),
        ("/home/me/my runs/final", "final"),
        ("file:///home/me/a.json", "a.json"),
        ("~/runs/final", "final"),
        ("C:\\\\Users\\\\me\\\\a.json".replace("\\\\", "\\"), "a.json"),
        ("at '/home/me/a.json', line 3", "at 'a.json', line 3"),
        ("/root/.cache/hub/models--owner--name/snapshots/0123abcd", "owner/name"),
        ("runs/final", "runs/final"),
        ("owner/name", "owner/name"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("{{ '</s>' }}/no_think and/or", "{{ '</s>' }}/no_think and/or"),
        ("/think", "think"),
    ],
)
def test_places_are_left_out(text: str, kept: str) -> None:
    assert without_places({"a": [text, 3, None]}) == {"a": [kept, 3, None]}


def test_the_home_folder_is_put_in_for_parts_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    vision = {"vision_tower": "~/a", "fused": [{"vision_tower": "~/b", "type": "~"}]}
    whole = {"vision_tower": "/home/me/a", "fused": [{"vision_tower": "/home/me/b", "type": "~"}]}
    assert full_names({"vision": vision}) == {"vision": whole}
