"""LoRAs that a prompt names in the webui's grammar: `<lora:ns/name:0.8>`."""

from __future__ import annotations

from scumble.errors import InvalidRequest
from scumble.request import Adapter, Request
from scumble_server.prompts.grammar.tags import find_tag, parse_tags


def without_tags(request: Request) -> Request:
    """Move the LoRAs of a request's prompt to its adapters. Raises InvalidRequest."""
    options = request.options
    if options.grammar != "webui":
        return request
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if (tag := find_tag(text)) is not None and (field == "negative_prompt" or not options.lora_tags):
            how = "set the option lora_tags, or" if field == "prompt" else "tags act in the prompt alone:"
            raise InvalidRequest(f"{field} has {tag}; {how} name it in adapters and leave it out here", field=field)
    text, tags = parse_tags(request.prompt)
    adapters = (
        *request.adapters,
        *(Adapter(ref=tag.ref, weight=tag.weight, text_weight=tag.text_weight) for tag in tags),
    )
    if not tags:
        return request
    return Request.parse(
        {
            **{name: getattr(request, name) for name in Request.model_fields},
            "prompt": text,
            "adapters": adapters,
            "options": options.model_copy(update={"lora_tags": False}),
        }
    )
