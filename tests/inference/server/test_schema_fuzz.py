"""schemathesis asks whatever the server's own OpenAPI allows, and whatever it forbids."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

EXAMPLES = 200
"""For each operation."""
MODEL = "learnt-3.answers"


def operations(address: str) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    schema.config.generation.update(modes=list(schemathesis.GenerationMode))
    return [result.ok() for result in schema.get_all_operations()]


@pytest.fixture(scope="session")
def schema(address: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{address}/openapi.json").json()
    return found


def test_the_schema_names_what_is_served_and_what_is_ignored(schema: dict[str, Any]) -> None:
    assert set(schema["paths"]) == {
        "/v1/models",
        "/v1/models/{model}",
        "/v1/completions",
        "/v1/chat/completions",
        "/health",
        "/ready",
        "/metrics",
    }
    assert "422" not in str(schema["paths"]), "invalid requests are answered with 400"
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {name for name, field in fields.items() if field.get("x-ignored")} >= {"user", "store", "metadata"}


def test_S1_whatever_the_schema_makes_of_it_the_server_never_fails(address: str) -> None:
    # One check is left out: a schema cannot say that a field means something only beside another, or how many tokens a
    # text has, so what it allows may be refused. `test_openai_client` has what must be accepted.
    told: Counter[str] = Counter()
    for operation in operations(address):

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and case.body["model"]:
                case.body["model"] = MODEL  # else nearly all would be refused for a model that is not there
            response = case.call()
            told[f"{response.status_code // 100}xx"] += 1
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

        ask()
    print(f"schema fuzz: {sum(told.values())} requests, {dict(told)}")
    assert told["5xx"] == 0
    assert told["2xx"] > 50
    assert told["4xx"] > 50
