"""What a model is asked with: the templates of instructions and chats, for making samples and for generating.

Needs no torch; transformers' renderer is imported where a chat is rendered.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config.data_sections import ChatFormat, Format
from llmtrain.errors import TokenizerError

PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{{ '\n' }}{% endif %}"
)
"""For tokenizers that have no chat template."""


def fill(template: str, instruction: str, given: str) -> str:
    """An instruction's prompt. One pass: braces in the instruction stay as they are."""
    parts = template.split("{instruction}")
    return instruction.join(part.replace("{input}", given) for part in parts)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of messages with `role` and `content`."""

    text: str
    tokens: Mapping[str, str]
    """bos_token, eos_token, ... as the template may write them."""

    @property
    def writes_prefix(self) -> bool:
        """It says itself what a text begins with."""
        return self.text != PLAIN_TEMPLATE

    def render(self, messages: Sequence[Mapping[str, Any]], asks: bool) -> str:
        """The messages' text; with `asks`, up to where the assistant's answer begins.

        Raises:
            TokenizerError: the template fails.
        """
        import jinja2

        try:
            texts, _ = _renderer()(
                conversations=[list(messages)],
                chat_template=self.text,
                add_generation_prompt=asks,
                **self.tokens,
            )
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template fails: {error}") from None
        return texts[0]


def chat_template(format: ChatFormat, own: str | None, tokens: Mapping[str, str]) -> ChatTemplate:
    """The configured template, else the tokenizer's `own`, else a plain one.

    Raises:
        TokenizerError: the configured one is neither a template nor a file.
    """
    configured = None if format.template is None else read_template(format.template)
    return ChatTemplate(configured or own or PLAIN_TEMPLATE, tokens)


def question(format: Format, text: str, own: str | None, tokens: Mapping[str, str]) -> tuple[str, bool]:
    """The prompt that samples of this format have for what a person asks, and whether it says itself what a text
    begins with. Free text stays as it is.

    Args:
        own, tokens: the tokenizer's, for a chat.
    """
    if format.kind == "instruction":
        return fill(format.template_without_input, text, ""), False
    if format.kind == "chat":
        template = chat_template(format, own, tokens)
        return template.render([{"role": "user", "content": text}], asks=True), template.writes_prefix
    return text, False


def read_template(setting: str) -> str:
    """A template as it was given, or out of the file that was named."""
    path = Path(setting).expanduser()
    is_file = "{" not in setting and path.is_file()
    if "{" not in setting and not is_file:
        raise TokenizerError(f"data.format.template={setting}: neither a file nor a template ({{% for ... %}})")
    return path.read_text(encoding="utf-8") if is_file else setting


@functools.cache
def _renderer() -> Any:
    """transformers' sandboxed renderer, as its tokenizers use it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template
