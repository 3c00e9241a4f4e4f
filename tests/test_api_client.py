"""The client of a server that may be busy: its pace, its key and its address. tests/test_server_writer.py has it ask one."""

from __future__ import annotations

import pytest

from pipeline.core.files import UserError
from pipeline.teachers.api_client import Pace, address, key_of


def test_the_pace_spreads_requests_and_tokens():
    pace = Pace(60, None)
    assert [round(pace.turn(1)) for _ in range(3)] == [0, 1, 2]
    pace = Pace(None, 600)
    assert [round(pace.turn(50)) for _ in range(3)] == [0, 5, 10]
    pace.settle(-50)
    assert round(pace.turn(0)) == 10, "a request that took less than was booked lets the next begin sooner"
    pace.delay(30)
    assert round(pace.turn(0)) == 30
    assert Pace(None, None).turn(1000) == 0


@pytest.mark.parametrize(("value", "message"), [
    (None, "OPENAI_API_KEY is not set"), ("  ", "is not set"), ("two words", "has a blank"), ("schlüssel", "has a blank"),
])
def test_a_key_that_is_none(monkeypatch, value, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(UserError, match=message) as caught:
        key_of("OPENAI_API_KEY")
    assert not value or not value.strip() or value not in str(caught.value)


def test_a_key_in_the_config_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(UserError, match="takes the name of an environment variable") as caught:
        key_of("sk-verysecret-0")
    assert "verysecret" not in str(caught.value)
    for url in ("https://me:verysecret@host/v1", "https://host/v1?key=verysecret", "https://host/v1#verysecret"):
        with pytest.raises(UserError, match="more than scheme, host and path") as caught:
            address(url)
        assert "verysecret" not in str(caught.value)
    with pytest.raises(UserError, match="give a URL like"):
        address("localhost:8000")
    assert address("HTTPS://Host:8443/v1/") == "https://host:8443/v1"
