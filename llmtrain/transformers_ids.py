"""Whether transformers gives a tokenizer's ids as its tokenizer.json says, as training did, and settings with which it
does.

Some of transformers' classes (LlamaTokenizer) take the vocabulary alone from that file, and split text their own way.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import prompts
from llmtrain.config.data_sections import Format
from llmtrain.errors import TokenizerError

if TYPE_CHECKING:  # most who need this module's names load no tokenizer
    from tokenizers import Tokenizer

_FILE = "tokenizer.json"
_AS_IT_STANDS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that apply tokenizer.json; older versions of transformers know the first one alone."""
_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    " a space before,  two  within, one after ",
    "one\ntwo\n\nthree\r\n\tfour",
    "IT'S 2,345.67 and we'll've $1,000,000",
    "naïve cafe\u0301 ﬁ ½ Ⅷ 漢字かな 한국어 हिन्दी",
    "🙂👩\u200d👧 \x00\x7f\u00a0\u3000\ufeff",
    "def f(x):\n    return {**x, 'a': 1}  # <b>▁</b>",
)


def settings_needed(folder: Path, model_type: str | None = None) -> dict[str, Any]:
    """What a tokenizer's settings have to say for transformers to give the ids that its tokenizer.json gives; nothing
    where it does so already.

    Args:
        model_type: transformers' name of the model's kind, which decides as well, where no config.json lies there yet.
    """
    settings = prompts.read_settings(folder)
    if settings.get("tokenizer_class") in _AS_IT_STANDS or _is_gpt2s(folder, settings, model_type):
        return {}  # known without transformers, whose import would delay each start by seconds
    theirs = _load(folder, model_type)
    if theirs is None or not differing(_own(folder), theirs):
        return {}
    # What the class says of itself, the other one does not know.
    needed = {name: str(token) for name, token in theirs.special_tokens_map.items() if name in prompts.TOKENS}
    needed |= {"padding_side": theirs.padding_side, "model_input_names": theirs.model_input_names}
    return {"tokenizer_class": _AS_IT_STANDS[0], **{n: v for n, v in needed.items() if not settings.get(n)}}


def _is_gpt2s(folder: Path, settings: dict[str, Any], model_type: str | None) -> bool:
    """Whether the file splits text as GPT-2's class does anyway."""
    kind = settings.get("tokenizer_class")
    if kind not in _GPT2 and not (kind is None and model_type == "gpt2"):
        return False
    own = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    splits = own.get("pre_tokenizer") or {}
    prefixed = splits.get("add_prefix_space", True) or settings.get("add_prefix_space", False)
    is_plain = own.get("normalizer") is None and own["model"].get("type") == "BPE" and not prefixed
    return is_plain and splits.get("type") == "ByteLevel" and splits.get("use_regex", True)


def wrong_texts(folder: Path, format: Format) -> list[str]:
    """Of a few texts, and a chat where the samples are chats, those whose ids transformers gives otherwise than
    training; with its tokenizer not to be loaded, all of them."""
    own, theirs = _own(folder), _load(folder)
    if theirs is None:
        return list(_TEXTS)
    wrong = differing(own, theirs)
    if format.kind == "chat":
        with contextlib.suppress(TokenizerError):  # a template may want more than a question
            text, has_prefix = prompts.question(format, _TEXTS[0], *prompts.read_own(folder))
            if _asked(theirs, _TEXTS[0]) != prompts.prompt_ids(own, text, has_prefix):
                wrong.append(text)
    return wrong


def _asked(theirs: Any, text: str) -> list[int] | None:
    chat = [{"role": "user", "content": text}]
    try:
        given = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception:  # noqa: BLE001  a template fails in any way
        return None
    return list(given["input_ids"])


def differing(own: "Tokenizer", theirs: Any) -> list[str]:
    """Those of a few texts whose ids differ from those of a tokenizer of transformers."""
    special = [str(token) for token in theirs.all_special_tokens[:4]]
    texts = [*_TEXTS, *(f"before{token}after {token} end" for token in special)]
    return [text for text in texts if own.encode(text, add_special_tokens=False).ids != _ids(theirs, text)]


def download(name: str, revision: str | None, to: Path, trust_remote_code: bool = False) -> Any:
    """Write the files of a tokenizer on the Hub, as `save_pretrained` does, into a folder; returns what transformers
    made of it. Its tokenizer.json is the repository's own where the other one would give other ids.

    Raises:
        What transformers raises.
    """
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    theirs = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    theirs.save_pretrained(str(to))
    try:
        file = cached_file(name, _FILE, revision=revision, local_files_only=True)  # it was loaded just now
    except OSError:
        file = None
    if file is not None and (to / _FILE).is_file():
        own = _own(Path(file).parent)
        if own.get_vocab(with_added_tokens=True) == theirs.get_vocab() and differing(own, theirs):
            shutil.copyfile(file, to / _FILE)
    return theirs


def _own(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / _FILE))
    own.no_truncation()
    own.no_padding()
    return own


def _load(folder: Path, model_type: str | None = None) -> Any:
    """As programs do that know transformers alone; None where it cannot be loaded."""
    from transformers import AutoConfig, AutoTokenizer

    config = None if model_type is None else AutoConfig.for_model(model_type)
    try:
        return AutoTokenizer.from_pretrained(str(folder), config=config, trust_remote_code=False)
    except Exception:  # noqa: BLE001  classes read what they need from anywhere
        return None


def _ids(theirs: Any, text: str) -> list[int]:
    return list(theirs(text, add_special_tokens=False)["input_ids"])
