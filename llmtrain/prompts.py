"""What a model is asked with: the templates of instructions and chats, and what a tokenizer puts before a text; for
making samples, for generating, and for those who load a model elsewhere.

Needs no torch; transformers' renderer is imported where a chat is rendered.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import files
from llmtrain.config.data_sections import ChatFormat, Format
from llmtrain.errors import ConfigError, TokenizerError

if TYPE_CHECKING:  # half of those who need a template need no tokenizer
    from tokenizers import Tokenizer

TEMPLATE = "chat_template.jinja"
"""A tokenizer's chat template, as transformers reads it beside the tokenizer."""
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""What a template may write, by the names of a tokenizer's settings."""
_SETTINGS = "tokenizer_config.json"

PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{{ '\n' }}{% endif %}"
)
"""For tokenizers that have no chat template."""
_SHIPPED_PLAIN = re.compile(r'(?:\{\{ "(?:[^"\\]|\\.)*" \}\})?' + re.escape(PLAIN_TEMPLATE))
"""As `shipped_template` writes it."""


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

    def render(
        self, messages: Sequence[Mapping[str, Any]], asks: bool, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The messages' text; with `asks`, up to where the assistant's answer begins.

        Raises:
            TokenizerError: the template fails.
        """
        import jinja2

        try:
            texts, _ = _renderer()(
                conversations=[list(messages)],
                tools=None if tools is None else list(tools),
                chat_template=self.text,
                add_generation_prompt=asks,
                **self.tokens,
            )
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template fails: {error}") from None
        except Exception as error:  # a template computes with what the messages hold: TypeError, KeyError, ...
            raise TokenizerError(f"the chat template fails: {type(error).__name__}: {error}") from error
        return texts[0]


def chat_template(format: ChatFormat, own: str | None, tokens: Mapping[str, str]) -> ChatTemplate:
    """The configured template, else the tokenizer's `own`, else a plain one.

    Raises:
        TokenizerError: the configured one is neither a template nor a file.
    """
    configured = None if format.template is None else read_template(format.template)
    if own is not None and _SHIPPED_PLAIN.fullmatch(own):
        own = PLAIN_TEMPLATE
    return ChatTemplate(configured or own or PLAIN_TEMPLATE, tokens)


def question(
    format: Format, text: str, own: str | None, tokens: Mapping[str, str], system: str | None = None
) -> tuple[str, bool]:
    """The prompt that samples of this format have for what a person asks, and whether it says itself what a text
    begins with. Free text stays as it is.

    Args:
        own, tokens: the tokenizer's, for a chat.
        system: what a chat begins with, before the person asks.

    Raises:
        ConfigError: there is no place for `system`.
        TokenizerError: the chat template fails.
    """
    if format.kind == "chat":
        template = chat_template(format, own, tokens)
        asked = [{"role": "user", "content": text}]
        prompt = template.render(asked, asks=True)
        return prompt if system is None else _with_system(template, system, asked, prompt), template.writes_prefix
    if system is not None:
        what = "instructions" if format.kind == "instruction" else "free text"
        raise ConfigError(
            [f"--system: this model is asked with {what} (data.format.kind={format.kind}), which has no system prompt; "
             "write it into --prompt"]
        )  # fmt: skip
    return (fill(format.template_without_input, text, "") if format.kind == "instruction" else text), False


def _with_system(template: ChatTemplate, system: str, asked: list[dict[str, str]], without: str) -> str:
    """Templates refuse such a message, or leave it out in silence, where the model was made without."""
    message = {"role": "system", "content": system}
    try:
        prompt = template.render([message, *asked], asks=True)
    except TokenizerError as error:
        raise ConfigError([f"--system: this model takes no system prompt ({error}); write it into --prompt"]) from None
    if prompt.count(system.strip()) == without.count(system.strip()):
        raise ConfigError(["--system: this model's chat template leaves a system prompt out; write it into --prompt"])
    return prompt


def read_template(setting: str) -> str:
    """A template as it was given, or out of the file that was named."""
    path = Path(files.expand_home(setting))
    is_file = "{" not in setting and path.is_file()
    if "{" not in setting and not is_file:
        raise TokenizerError(f"data.format.template={setting}: neither a file nor a template ({{% for ... %}})")
    return path.read_text(encoding="utf-8") if is_file else setting


def prefix_ids(tokenizer: "Tokenizer") -> list[int]:
    """What the tokenizer itself puts before a text (<s>, of Llama's), as every document of the shards begins. What it
    would put after one is left out: a prompt is to go on."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


def prompt_ids(tokenizer: "Tokenizer", text: str, has_prefix: bool) -> list[int]:
    """A prompt's ids, beginning as the documents that were trained on.

    Args:
        has_prefix: the text says itself what it begins with.
    """
    prefix = [] if has_prefix else prefix_ids(tokenizer)
    return [*prefix, *tokenizer.encode(text, add_special_tokens=False).ids]


def asked_ids(
    tokenizer: "Tokenizer", folder: Path, eos_id: int, format: Format, prompt: str, system: str | None = None
) -> list[int]:
    """The ids of what a person asks, put as the samples of this format put it: see `question`, also for errors.

    Args:
        folder: the tokenizer's.
    """
    own, tokens = read_own(folder)
    tokens["eos_token"] = tokenizer.id_to_token(eos_id) or ""
    asked, has_prefix = question(format, prompt, own, tokens, system)
    return prompt_ids(tokenizer, asked, has_prefix)


def files_of(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder. Of several chat templates only the default lies among them; with the others,
    in a folder of their own, no sample was made."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def read_own(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Of a tokenizer's folder: its chat template, if it has one, and the special tokens that a template may write."""
    settings, file = read_settings(folder), folder / TEMPLATE
    tokens = {name: _text(settings.get(name)) for name in TOKENS}
    found: Any = settings.get("chat_template")
    if file.is_file():
        found = file.read_text(encoding="utf-8")
    elif isinstance(found, list):  # several with names, as older tokenizers have them
        found = next((template.get("template") for template in found if template.get("name") == "default"), None)
    return found, tokens


def shipped_template(format: ChatFormat, folder: Path) -> str:
    """The template that samples were made with, to stand beside the model, given the tokenizer's folder.

    transformers puts nothing before what a template has written, so the plain one says here what a text begins with.

    Raises:
        TokenizerError: the configured one is neither a template nor a file.
    """
    from tokenizers import Tokenizer

    own, tokens = read_own(folder)
    template = chat_template(format, own, tokens)
    if template.writes_prefix:
        return template.text
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prefix = "".join(tokenizer.id_to_token(number) or "" for number in prefix_ids(tokenizer))
    quoted = json.dumps(prefix, ensure_ascii=False)
    return f"{{{{ {quoted} }}}}{template.text}" if prefix else template.text


def write_settings(
    folder: Path, eos_id: int | None, template: str | None, needed: Mapping[str, Any] | None = None
) -> None:
    """Let a tokenizer's folder say what ended the texts of training, where it names nothing, and this chat template.

    transformers reads a template's file before what stands in the settings; programs that read the settings alone
    find no other there.

    Args:
        needed: further settings (transformers_ids.py).
    """
    from tokenizers import Tokenizer

    settings = read_settings(folder)
    changed = {**settings, **(needed or {})}
    if eos_id is not None and not _text(settings.get("eos_token")):
        changed["eos_token"] = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(eos_id)
    if template is not None and template != read_own(folder)[0]:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
        changed.pop("chat_template", None)
    if changed != settings:
        (folder / _SETTINGS).write_text(json.dumps(changed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """What stands beside tokenizer.json.

    Raises:
        TokenizerError: it is no JSON object.
    """
    file = folder / _SETTINGS
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{file}: must be a JSON object, not a {type(found).__name__}")
    return found


def _text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


@functools.cache
def _renderer() -> Any:
    """transformers' sandboxed renderer, as its tokenizers use it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template
