"""The API's description, made from the models that check the bodies."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import shoal

ERRORS = {
    "400": "The request is not what it should be.",
    "401": "A key is needed.",
    "404": "There is no such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too long.",
    "415": "The body is not JSON.",
    "429": "Too many requests; Retry-After says when to come again.",
    "500": "The server failed.",
    "503": "The engine has stopped.",
    "504": "The request took too long.",
}

REF = "#/components/schemas/{model}"


def describe(posts: dict[str, tuple[type[BaseModel], str]], gets: dict[str, str], *, keyed: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document.

    Args:
        posts: path -> model of the body, summary.
        gets: path -> summary; `{name}` in a path is a parameter.
        keyed: a key is asked for.
    """
    inputs = [(model, "validation") for model, _ in posts.values()]
    _, found = models_json_schema(inputs, ref_template=REF)  # type: ignore[arg-type]
    schemas = dict(found.get("$defs", {}))
    nullable = {"type": ["string", "null"]}
    error = {"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable, "code": nullable}
    schemas["Error"] = {
        "type": "object",
        "properties": {"error": {"type": "object", "properties": error, "required": list(error)}},
        "required": ["error"],
    }
    failures = {
        status: {"description": text, "content": _json({"$ref": REF.format(model="Error")})}
        for status, text in ERRORS.items()
    }
    paths: dict[str, Any] = {}
    for path, (model, summary) in posts.items():
        body = {"required": True, "content": _json({"$ref": REF.format(model=model.__name__)})}
        answer = _json({"type": "object"}) | {"text/event-stream": {"schema": {}}}
        responses = {"200": {"description": "The answer.", "content": answer}, **failures}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    for path, summary in gets.items():
        shown = re.sub(r"\{(\w+):\w+\}", r"{\1}", path)  # Starlette's convertors are no part of the description
        names = re.findall(r"\{(\w+)\}", shown)
        parameters = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
        responses = {"200": {"description": "The answer."}, **{s: failures[s] for s in ("401", "404", "500")}}
        paths[shown] = {"get": {"summary": summary, "parameters": parameters, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Shoal", "version": shoal.__version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if keyed else [],
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
