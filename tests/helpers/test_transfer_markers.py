"""Markers of a GridFTP transfer: progress, and the ranges that a restart leaves out."""

from __future__ import annotations

from pdm.workqueue.helpers.gridftp.replies import Reply
from pdm.workqueue.helpers.gridftp.transfer import TransferMarkers


def performance(stripe: int, count: int) -> Reply:
    lines = (
        "112-Perf Marker",
        " Timestamp:  1795978899.1",
        f" Stripe Index: {stripe}",
        f" Stripe Bytes Transferred: {count}",
        " Total Stripe Count: 2",
        "112 End.",
    )
    return Reply(112, "\n".join(lines))


def ranges(text: str) -> Reply:
    return Reply(111, f"111 Range Marker {text}")


def test_the_stripes_of_a_file_are_added_up() -> None:
    markers = TransferMarkers()
    for stripe, count in ((0, 100), (1, 50), (0, 300)):
        markers.take(performance(stripe, count))
    assert (markers.received, markers.kept) == (350, 0)


def test_ranges_are_merged_in_whatever_order_they_come() -> None:
    markers = TransferMarkers()
    for text in ("0-100", "300-400", "100-200,500-600", "150-320"):
        markers.take(ranges(text))
    assert markers.ranges == [(0, 400), (500, 600)]
    assert markers.restart_marker() == b"0-400,500-600"
    assert markers.received == markers.kept == 500
    assert markers.resume_at == 400


def test_after_a_restart_what_was_kept_counts_too() -> None:
    markers = TransferMarkers()
    markers.take(performance(0, 1000))
    markers.take(ranges("0-800"))
    markers.restart()
    assert markers.received == 800
    markers.take(performance(0, 100))
    assert markers.received == 900


def test_what_is_no_marker_counts_nothing() -> None:
    markers = TransferMarkers()
    for reply in (
        Reply(150, "150 Beginning transfer."),
        ranges("9-3"),
        ranges("x"),
        Reply(112, "112 End."),
        ranges("5"),
    ):
        markers.take(reply)
    assert (markers.received, markers.ranges) == (0, [])
