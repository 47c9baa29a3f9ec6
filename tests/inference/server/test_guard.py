"""Who may ask the server for anything (S5)."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from stages.inference.server.app import create_app
from stages.inference.server.models import ServedModel
from stages.inference.server.settings import ServerSettings
from tests.inference.server.refusals import assert_refused


def test_S5_it_listens_on_this_machine_unless_told_otherwise() -> None:
    assert ServerSettings().host == "127.0.0.1"
    assert ServerSettings().only_this_machine
    assert ServerSettings(host="::1").only_this_machine
    assert ServerSettings(host="LocalHost").only_this_machine
    assert not ServerSettings(host="0.0.0.0").only_this_machine
    assert not ServerSettings(host="example").only_this_machine


def test_S5_where_a_key_is_asked_nothing_is_told_without_it(served: ServedModel, serve: Any) -> None:
    with serve(create_app([served], ServerSettings(api_key="a key"))) as address:
        for given in (None, "Bearer", "Bearer wrong", "Bearer a key2", "Basic a key", "Bearer \xe9"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/api/status", "/api/runs", "/api/runs/x", "/nothing"):
                refused = httpx.get(address + path, headers=headers)
                assert assert_refused(refused, 401)["code"] == "invalid_api_key"
            assert_refused(httpx.post(address + "/v1/chat/completions", content=b"{", headers=headers), 401)
        for path in ("/health", "/ready"):
            assert httpx.get(address + path).status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="a key", max_retries=0) as client:
            assert len(client.models.list().data) == 1
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="another", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_S5_without_a_key_a_foreign_name_for_this_machine_is_refused(address: str) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        error = assert_refused(httpx.get(address + "/v1/models", headers={"host": host}), 421)
        assert {"--api-key", "--host"} <= set(error["message"].replace(",", "").split())
    for host in ("localhost", "localhost:1234", "LocalHost:9", "127.0.0.1:9", "[::1]:9"):
        assert httpx.get(address + "/v1/models", headers={"host": host}).status_code == 200


def test_S5_an_address_of_this_machine_that_it_was_told_to_listen_on_is_no_foreign_name(
    served: ServedModel, serve: Any
) -> None:
    for told, host in (("127.0.0.2", "127.0.0.2:9"), ("::1", "[::1]:9")):
        with serve(create_app([served], ServerSettings(host=told))) as address:
            for name, status in ((host, 200), ("localhost:9", 200), ("evil.example", 421), ("127.0.0.3", 421)):
                assert httpx.get(address + "/v1/models", headers={"host": name}).status_code == status
