"""Chat templates: Jinja programs that come with a model, run in a sandbox."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from kvstore.errors import InvalidArgumentError

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """One model's template; ``tokens`` are names it may use, such as ``bos_token``."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidArgumentError(f"the model's chat template is broken: {error}") from error

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        """The conversation as the model's training text.

        Raises InvalidArgumentError when the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidArgumentError(
                f"the model's chat template refuses the messages: {error}"
            ) from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
