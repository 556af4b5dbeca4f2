"""A conversation template as the Jinja text that transformers and vLLM render."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, template_of
from llava.errors import UserError

# What a chat template has in it -> the template that says the same.
BY_LOOK = {"<|im_start|>": "qwen", "[INST]": "llama_2"}


class _Layout(NamedTuple):
    """What stands before and behind the texts of a conversation."""

    opening: str  # where no message brings a system prompt
    system: tuple[str, str]
    first_user: str
    user: tuple[str, str]
    answer: tuple[str, str]
    open_user: str  # without a text
    open_answer: str


def _layout(conversation: Conversation, name: str) -> _Layout:
    """Raises ``UserError`` for a template that has no turns."""
    style, sep, roles = conversation.sep_style, conversation.sep, conversation.roles
    opening = conversation.get_prompt()
    if style in (SeparatorStyle.TWO, SeparatorStyle.SINGLE):
        after = sep if style is SeparatorStyle.SINGLE else conversation.sep2
        user, answer = (f"{roles[0]}: ", sep), (f"{roles[1]}: ", after)
        return _Layout(opening, ("", sep), user[0], user, answer, f"{roles[0]}:", f"{roles[1]}:")
    if style in (SeparatorStyle.MPT, SeparatorStyle.CHATML):
        end = sep + ("\n" if style is SeparatorStyle.CHATML else "")
        header = conversation.system.split("\n")[0] + "\n"
        return _Layout(opening, (header, end), roles[0], (roles[0], end), (roles[1], end), *roles)
    if style is SeparatorStyle.LLAMA_2:
        before, behind = "[INST] <<SYS>>\n", "\n<</SYS>>\n\n"
        opening = f"{before}{conversation.system}{behind}" if conversation.system else "[INST] "
        user, answer = (f"{sep}[INST] ", " [/INST]"), (" ", f" {conversation.sep2}")
        return _Layout(opening, (before, behind), "", user, answer, "", "")
    raise UserError(f"--conv-mode {name}: has no turns, so that no chat template can say it; pass llava_v1 or qwen")


def usual_template(tokenizer: Any, config: Any) -> str:
    """Name of the conversation template of a model: what it was taught here, else what its tokenizer's chat template
    looks like, else what is usual for its kind (``template_of``).
    """
    own = getattr(tokenizer, "chat_template", None)
    taught = config.get("mm_conv_mode")
    if taught is None and isinstance(own, str):
        for mark, name in BY_LOOK.items():
            if mark in own:
                return name
    return template_of(config)


def turn_opening(conversation: Conversation) -> str:
    """What a template writes behind the special token that ends an answer: "USER:"."""
    return conversation.roles[0] + ":" if conversation.sep_style is SeparatorStyle.TWO else "[INST]"


def chat_template(conversation: Conversation, name: str) -> str:
    """Jinja that renders what ``conversation.get_prompt`` gives for the same turns.

    A message's content is a string, taken as it is, or a list of parts; pictures come before the text then, each as
    ``<image>`` and a newline, as at training. A system message takes the place of the template's own.

    Raises:
        UserError: the template called ``name`` has no turns.
    """
    layout = _layout(conversation, name)
    say = {
        "opening": layout.opening,
        "before_system": layout.system[0],
        "behind_system": layout.system[1],
        "first_user": layout.first_user,
        "before_user": layout.user[0],
        "behind_user": layout.user[1],
        "before_answer": layout.answer[0],
        "behind_answer": layout.answer[1],
        "open_user": layout.open_user,
        "open_answer": layout.open_answer,
        "picture": f"{DEFAULT_IMAGE_TOKEN}\n",
    }
    # Jinja reads a double-quoted string as JSON writes it.
    quoted = {key: json.dumps(text) for key, text in say.items()}
    for key, text in quoted.items():
        quoted[key] = text.replace("{", "\\u007b").replace("}", "\\u007d")
    lines = []
    for line in _TEMPLATE.strip().splitlines():
        for key, text in quoted.items():
            line = line.replace(f"@{key}@", text)
        lines.append(line.strip())
    return "\n".join(lines)


# vLLM tells from the loops over message['content'] that lists of parts may be passed.
_TEMPLATE = """
{%- set ns = namespace(before_user=@first_user@, text='') -%}
{%- if messages[0]['role'] != 'system' -%}
    {{- @opening@ -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set ns.text = '' -%}
    {%- if message['content'] is string -%}
        {%- set ns.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}
            {%- set ns.text = ns.text + @picture@ -%}
        {%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {%- set ns.text = ns.text + part['text'] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {{- @before_system@ + ns.text + @behind_system@ -}}
    {%- elif message['role'] == 'user' -%}
        {{- ns.before_user + ns.text + @behind_user@ if ns.text else @open_user@ -}}
        {%- set ns.before_user = @before_user@ -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- @before_answer@ + ns.text + @behind_answer@ if ns.text else @open_answer@ -}}
    {%- else -%}
        {{- raise_exception('expected turns of user and assistant, and a system message only at the start') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- @open_answer@ -}}
{%- endif -%}
"""
