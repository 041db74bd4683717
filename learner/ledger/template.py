"""Chat templates, rendered as transformers renders them, without transformers (which would load torch)."""

import datetime
import json
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = list[dict[str, Any]]


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_through"), [], [], body).set_lineno(line)

    def _through(self, caller: Macro) -> str:
        return caller()


class ChatTemplate:
    """A model's chat template.

    Source: transformers.utils.chat_template_utils; the tests compare with it.
    """

    def __init__(self, text: str, special_tokens: dict[str, str]) -> None:
        """`special_tokens` (bos_token and the like) are variables of the template.

        Raises:
            jinja2.TemplateError: The text is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.globals.update(functions)
        self._template = environment.from_string(text)
        self._special_tokens = special_tokens

    def render(self, messages: Messages, kwargs: dict[str, Any]) -> str:
        """The text of `messages`, with the beginning of the answer.

        Raises:
            jinja2.TemplateError: The template refuses the messages.
        """
        values = {**self._special_tokens, "tools": None, "documents": None, "add_generation_prompt": True, **kwargs}
        try:
            return self._template.render(messages=messages, **values)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; this one does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
