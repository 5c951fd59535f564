"""Pauses between attempts grow, unless the server says how long to wait."""

import time
from email.utils import formatdate

import pytest

from voxtral_dist.serving.retries import Outage, pause_seconds


def test_pauses_double_up_to_half_a_minute_and_differ():
    for attempt, longest in ((1, 0.5), (2, 1.0), (4, 4.0), (7, 30.0), (2000, 30.0)):
        pauses = [pause_seconds(attempt, None) for _ in range(50)]
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(set(pauses)) > 1


def test_the_server_decides_where_it_says_so():
    assert pause_seconds(5, "7") == 7.0
    assert pause_seconds(1, formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=2)
    assert pause_seconds(1, formatdate(time.time() - 100, usegmt=True)) == 0
    for unreadable in ("soon", "²", "-1", ""):
        assert pause_seconds(1, unreadable) <= 0.5


def test_a_server_that_answers_others_is_not_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("voxtral_dist.serving.retries.time.monotonic", lambda: now[0])
    outage = Outage(limit_seconds=10)
    now[0] = 108.0
    assert outage.seconds_left(failing_since=103.0) == 5
    outage.end()
    assert outage.seconds_left(failing_since=103.0) == 10
    now[0] = 118.0
    assert outage.seconds_left(failing_since=103.0) == 0
    # One that begins to fail late has its own time.
    assert outage.seconds_left(failing_since=115.0) == 7
