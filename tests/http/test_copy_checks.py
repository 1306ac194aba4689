"""What no copy may be asked, because it would remove the only copy of something."""

from __future__ import annotations

import pytest

from pdm.workqueue.http.copy_requests import check_not_removed
from pdm.workqueue.http.problems import InvalidInputError

MOVE = {"move": True}
MIRROR = {"sync": "size", "delete_extra": True}


@pytest.mark.parametrize(
    ("options", "source", "destination"),
    [
        (MOVE, "gsiftp://dtn1:2811/data/x", "sftp://dtn1:22/data/x"),
        (MOVE, "gsiftp://dtn1:2811/data", "root://user@dtn1:1094//data/x%20y/"),
        (MOVE, "https://dtn1:443/data/x", "sftp://dtn1:22/data/"),
        (MIRROR, "gsiftp://dtn1:2811/data/x%20y", "sftp://dtn1:22/data/./x y"),
        (MIRROR, "gsiftp://dtn1:2811/data/x", "sftp://dtn1:22/data"),
    ],
)
def test_one_storage_by_two_protocols_is_noticed(options: dict[str, object], source: str, destination: str) -> None:
    with pytest.raises(InvalidInputError):
        check_not_removed(options, source, destination)
    check_not_removed({}, source, destination)
    check_not_removed(options, source, destination.replace("dtn1", "dtn2"))


@pytest.mark.parametrize("options", [MOVE, MIRROR])
def test_other_places_of_a_storage_are_allowed(options: dict[str, object]) -> None:
    check_not_removed(options, "gsiftp://dtn1:2811/data/x", "sftp://dtn1:22/archive/x")
    check_not_removed(options, "file:///srv/a/tree", "file:///srv/b/tree")
