"""Tokenizers: trained, from a folder or from the Hub; and the fast way to apply one.

For a byte-level BPE with GPT-2's split regex, tiktoken gives the same ids about five times faster than
`tokenizers`. It is used only after both gave the same ids on a sample of the corpus and on texts
chosen to be difficult; anything else stays on `tokenizers`.
"""

import contextlib
import functools
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain import prompts, transformers_ids
from llmtrain.config import data_sections as schema
from llmtrain.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
_AS_IT_STANDS = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"}
"""transformers is to apply tokenizer.json and nothing else."""
_GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_DIFFICULT = (
    "  leading and   inner    spaces \t\t tabs\r\n\r\nnewlines\n\n\n  end   ",
    "it's we'll they've I'm you'd he're IT'S 'tis ''quoted'' don't",
    "naïve café e\u0301 ﬁ Ⅷ ½ ١٢٣ 漢字かな交じり文 한국어 हिन्दी",
    "🙂👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 \U0001f9ff",
    f"before{END_OF_TEXT}after {END_OF_TEXT}",
    "x" * 300 + " " * 300 + "9" * 300 + "!" * 300,
    "\x00\x01\x7f\u00a0\u2003\u3000\ufeff\u2028line",
    "def f(x):\n\treturn {**x, 'a': 1}  # ok\n",
)


def prepare(config: schema.DataSection, folder: Path, texts: Iterable[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, as transformers' AutoTokenizer reads them.

    Args:
        texts: what to train on, if the configuration says `kind: train`.

    Raises:
        TokenizerError: it cannot be had, or has no end-of-text token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    match config.tokenizer:
        case schema.TrainedTokenizer() as chosen:
            _train(chosen.vocab_size, texts, folder)
        case schema.FolderTokenizer() as chosen:
            _copy(Path(chosen.path), folder)
        case schema.HubTokenizer() as chosen:
            _download(chosen.name, chosen.revision, folder)
    encoder = Encoder(folder, fast=False)  # finds a lacking end-of-text token now
    if not (folder / "tokenizer_config.json").exists():
        _write_config(folder, encoder.token(encoder.eos_id))


def _train(vocab_size: int, texts: Iterable[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, END_OF_TEXT)


def _write_config(folder: Path, eos: str) -> None:
    """What transformers reads beside tokenizer.json."""
    tokens = {"bos_token": eos, "eos_token": eos, "unk_token": eos}
    settings = dict(sorted({**_AS_IT_STANDS, **tokens}.items()))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _copy(source: Path, folder: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise TokenizerError(
            f"{source / 'tokenizer.json'}: no such file; data.tokenizer.path must be a folder with one"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _add_named_tokens(source, folder)


def _add_named_tokens(source: Path, folder: Path) -> None:
    """Into the copied settings, from where older tokenizers name them (transformers reads them there as well)."""
    older = source / "special_tokens_map.json"
    if not older.is_file():
        return
    settings = prompts.read_settings(folder)
    try:
        named: dict[str, Any] = json.loads(older.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{older}: not JSON: {error}") from None
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    lacking = {name: texts[name] for name in prompts.TOKENS if texts.get(name) and not settings.get(name)}
    if lacking:
        text = json.dumps({**(settings or _AS_IT_STANDS), **lacking}, indent=1, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _download(name: str, revision: str | None, folder: Path) -> None:
    try:
        transformers_ids.download(name, revision, folder)
    except Exception as error:
        why = next(iter(str(error).splitlines()), "")
        raise TokenizerError(
            f"data.tokenizer.name={name}: this tokenizer cannot be loaded: {type(error).__name__}: {why}. Give a name "
            "on the Hub, or a folder with data.tokenizer={kind: folder, path: ...}; where it is not set, it is the "
            "base's own (model.base)"
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise TokenizerError(f"the tokenizer '{name}' has no tokenizer.json (a fast tokenizer is needed)")


def _load(folder: Path) -> Any:
    """A tokenizer that neither cuts nor fills up, whatever its file says."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Encoder:
    """Text -> ids, with the tokenizer of a folder. Text that looks like a special token stays text."""

    def __init__(self, folder: Path, fast: bool):
        file = folder / "tokenizer.json"
        try:
            self._spec: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            self._tokenizer = _load(folder)
        except Exception as error:
            raise TokenizerError(f"{file}: not a tokenizer: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self._find_eos(folder)
        self._folder = folder
        self._fast = tiktoken_encoding(self._spec) if fast else None

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    def encode(self, text: str) -> NDArray[np.uint32]:
        if self._fast is not None:
            with contextlib.suppress(ValueError):  # its regex gives up on, say, a million spaces before a word
                return self._fast.encode_to_numpy(text, disallowed_special=())
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_special(self, text: str) -> NDArray[np.uint32]:
        """Ids of a text in which special tokens count as such (what a chat template wrote)."""
        return np.array(self._special_tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    @functools.cached_property
    def _special_tokenizer(self) -> Any:
        return _load(self._folder)

    def text_end(self, text: str, count: int, special: bool) -> int:
        """How many characters of a text its first `count` ids stand for; `special`: those of `encode_special`."""
        if count == 0:
            return 0
        tokenizer = self._special_tokenizer if special else self._tokenizer
        # Where the next token begins would not do: GPT-2's tokenizer reports it without the space before a word.
        return tokenizer.encode(text, add_special_tokens=False).offsets[count - 1][1]

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text: [the id of <s>] for Llama's, nothing for GPT-2's."""
        return prompts.prefix_ids(self._tokenizer)

    @functools.cached_property
    def special_tokens(self) -> list[str]:
        return [token["content"] for token in self._spec.get("added_tokens", []) if token.get("special")]

    def token(self, number: int) -> str:
        return self._tokenizer.id_to_token(number) or ""

    def _find_eos(self, folder: Path) -> int:
        named = prompts.read_own(folder)[1]["eos_token"]
        for token in filter(None, (named, END_OF_TEXT, "</s>", "<|end_of_text|>")):
            if (found := self._tokenizer.token_to_id(token)) is not None:
                return found
        raise TokenizerError(
            f"{folder}: the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json to one of "
            "its tokens"
        )


def tiktoken_encoding(spec: dict[str, Any]) -> Any | None:
    """A tiktoken Encoding with the merges of a tokenizer.json; None if it is not of the shape that can be the same.

    tiktoken merges by token id where `tokenizers` merges by position in the list, so ids must rise with it.
    """
    model, splitter = spec.get("model", {}), spec.get("pre_tokenizer") or {}
    plain = (
        model.get("type") == "BPE"
        and spec.get("normalizer") is None
        and all(token.get("special") for token in spec.get("added_tokens", []))  # others are found inside text
        and not model.get("dropout")
        and not model.get("byte_fallback")
        and not model.get("ignore_merges")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
    )
    if not plain:
        return None
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    merged_ids = [vocab[a + b] for a, b in merges]
    byte_of = _bytes_of_gpt2_alphabet()
    single = [char for char in byte_of if char in vocab]
    if len(single) != 256 or merged_ids != sorted(set(merged_ids)):
        return None
    import tiktoken

    ranks = {bytes(byte_of[c] for c in token): vocab[token] for token in [*single, *(a + b for a, b in merges)]}
    # With no special token at all tiktoken runs at about 60% of its speed; this one is never looked for.
    unused = {"<|never in a text|>": max(vocab.values()) + 1}
    return tiktoken.Encoding("shards", pat_str=_GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=unused)


def same_ids(folder: Path, texts: Iterable[str]) -> bool:
    """Whether the fast path exists and gives the same ids as `tokenizers` on `texts` and on difficult ones."""
    fast, slow = Encoder(folder, fast=True), Encoder(folder, fast=False)
    if not fast.is_fast:
        return False
    return all(np.array_equal(fast.encode(text), slow.encode(text)) for text in (*_DIFFICULT, *texts))


def _bytes_of_gpt2_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    shown = [byte for byte in range(256) if re.match(r"[!-~¡-¬®-ÿ]", chr(byte))]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {**{chr(b): b for b in shown}, **{chr(256 + i): b for i, b in enumerate(hidden)}}
