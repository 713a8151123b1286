"""Our own OpenAPI document against the running server: whatever it allows or forbids, no 500 and no hang."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

import serving_kit
from serving_kit.http.app import all_endpoints
from serving_kit.http.openapi import Schema, Subject, document

PROMISES = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
schema = schemathesis.openapi.from_dict(document(Subject("function", "echo", "1"), all_endpoints()))


def echo(texts: list[Any]) -> list[Any]:
    return texts


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with serving_kit.serve(echo, name="contract", port=0) as server:
        assert httpx.get(f"{server.url}/openapi.json").json()["paths"] == schema.raw_schema["paths"]
        yield server


def check(case: Any, server: Any, **headers: str) -> None:
    response = case.call(base_url=server.url, headers=headers, timeout=10)
    assert response.status_code != 500, response.text
    case.validate_response(response, checks=PROMISES, headers=headers)


@schema.parametrize()
@MANY
def test_server_follows_the_document(case: Any, server: Any) -> None:
    check(case, server)


@schema.include(path="/settings").parametrize()
@MANY
def test_settings_follow_the_document_with_the_token(case: Any, server: Any) -> None:
    before = server.settings
    try:
        check(case, server, authorization=f"Bearer {server.token}")
    finally:
        server.tune(**before.to_dict())


def test_parameters_of_the_task() -> None:
    parameters = {"type": "object", "properties": {"top_k": {"type": "integer"}}}

    def inputs(parameters: Schema | None) -> Any:
        described: Any = document(Subject("fill-mask", "m", "1", parameters), all_endpoints())
        content = described["paths"]["/"]["post"]["requestBody"]["content"]
        [as_object] = [each for each in content["application/json"]["schema"]["oneOf"] if "required" in each]
        return as_object

    assert inputs(None)["properties"]["parameters"] == {"type": ["object", "null"]}
    assert inputs(parameters)["properties"]["parameters"] == {"oneOf": [parameters, {"type": "null"}]}
    assert inputs(parameters)["required"] == ["inputs"]
    needed = {**parameters, "required": ["top_k"]}
    assert inputs(needed)["properties"]["parameters"] == needed
    assert inputs(needed)["required"] == ["inputs", "parameters"]


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("fill-mask", {"text/plain"}),
        ("image-classification", {"application/octet-stream"}),
    ],
)
def test_media_types_of_the_task(task: str, kinds: set[str]) -> None:
    described: Any = document(Subject(task, "m", "1"), all_endpoints())
    content = described["paths"]["/"]["post"]["requestBody"]["content"]
    both = {"application/json", "multipart/form-data", "application/x-www-form-urlencoded"}
    assert content.keys() == both | kinds
