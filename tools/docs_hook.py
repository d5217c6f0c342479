"""What `make docs` does beyond mkdocs: the front page, the changelog and CONTRIBUTING come from the repository's root.

The reference is read from the sources, without importing them; griffe, which reads them, passes by folders that have no
`__init__.py`, as most of ours, so it is given a copy in which each has one.

Links of these pages and of docs/ that leave the documentation (to sources, recipes, tests) become links into the
repository where mkdocs.yml has a `repo_url`, and plain text where it has none.
"""

import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"^```.*?^```|(!?)\[([^\]]*)\]\(([^)\s]+)\)|`[^`\n]*`", re.DOTALL | re.MULTILINE)  # code as it is
COPY = Path(tempfile.mkdtemp(prefix="polymodal-docs-"))


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """Give griffe a copy of the sources."""
    for path in (ROOT / "src").rglob("*.py"):
        copy = COPY / path.relative_to(ROOT / "src")
        copy.parent.mkdir(parents=True, exist_ok=True)
        (copy.parent / "__init__.py").touch()
        shutil.copyfile(path, copy)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(COPY)]
    return config


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Let long keys in tables break behind their dots."""
    return re.sub(r"<td><code>[\w.]{25,}</code>", lambda found: found[0].replace(".", ".<wbr>"), html)


def on_post_build(config: Any) -> None:
    """Take the copy away."""
    shutil.rmtree(COPY, ignore_errors=True)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie in the root."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page to where they lead on the site."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri)

    def turn(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        if target is None or re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        own = next((name for name, root in PAGES.items() if root == whole), whole.removeprefix("docs/"))
        if files.get_file_from_path(own) is not None:
            return f"{mark}[{text}]({posixpath.relpath(own, here or '.')}{hash_}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{whole})" if config.repo_url else text

    return LINK.sub(turn, markdown)
