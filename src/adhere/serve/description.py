"""The page at /docs: what can be asked of the server, drawn from its own OpenAPI description, without anything from
another host."""

from __future__ import annotations

from typing import Any

from adhere.markup import document, escape


def described(openapi: dict[str, Any]) -> str:
    """Every route with what it does, the fields that it takes and the answers it gives, as an HTML page."""
    rows = []
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            answers = ", ".join(route["responses"])
            about = route.get("description") or route.get("summary", "")
            cells = (f"<code>{method.upper()} {escape(path)}</code>", escape(about), _fields(openapi, route), answers)
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    info, head = openapi["info"], ("request", "what it does", "fields (needed in bold)", "answers")
    body = (
        f"<h1>{escape(info['title'])}</h1>\n<p>{escape(info.get('summary', ''))} "
        '<a href="openapi.json">openapi.json</a> has every type and limit.</p>\n<table>\n'
        f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>\n{chr(10).join(rows)}\n</table>"
    )
    return document(info["title"], body)


def _fields(openapi: dict[str, Any], route: dict[str, Any]) -> str:
    """The fields of a route's body; those that it cannot do without are marked."""
    if "requestBody" not in route:
        return ""
    name = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schema = openapi["components"]["schemas"][name]
    needed = schema.get("required", ())
    return ", ".join(f"<b>{escape(field)}</b>" if field in needed else escape(field) for field in schema["properties"])
