"""What the documents name must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCUMENTS = (
    *(
        "README.md",
        "CONTRIBUTING.md",
        "docs/batch.md",
        "docs/bundled-model.md",
        "docs/bundled-model-log.md",
        "docs/degradation.md",
    ),
    *("docs/memory.md", "docs/performance.md", "docs/photographs.md", "docs/training.md", "training/presets/README.md"),
)


def test_contributing_s_table_names_paths_that_exist(repository: Path) -> None:
    rows = [line for line in (repository / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ")]
    paths = [path for row in rows for path in re.findall(r"`([^`]+)`", row.split("|")[2])]
    assert len(paths) > 20
    missing = [path for path in paths if not (repository / path).exists()]
    assert not missing, f"CONTRIBUTING.md names {missing}, which are not there: were they renamed?"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_that_exist(repository: Path, name: str) -> None:
    document = repository / name
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert not missing, f"{name} links to {missing}, which are not there"
