"""Settings of the data: sources, what a record becomes, tokenizer, splits, packing."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmtrain.config.section import MAY_CHANGE, Folder, Section

Use = Annotated[
    Literal["train", "heldout", "test"] | None,
    Field(
        description="Put all of this source into one split, e.g. a held-out file of its own; where one is for held-out "
        "(or test), the others give nothing to it. By default `data.split` decides."
    ),
]


class StdlibSource(Section):
    kind: Literal["stdlib"] = "stdlib"
    """The Python standard library's own sources: text that every machine already has (about 30 MB)."""
    use: Use = None


class TextSource(Section):
    kind: Literal["text"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files, folders or globs (`**` allowed); folders mean all `*.txt` and `*.md` below them."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Text between two documents of a file, e.g. "<|endoftext|>"; without it a file is one document."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """What to do with a file that is not valid UTF-8."""
    use: Use = None


class JsonlSource(Section):
    kind: Literal["jsonl"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or globs; one JSON object a line."""
    field: str = "text"
    """The object's key that holds the text."""
    use: Use = None


class JsonSource(Section):
    kind: Literal["json"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or globs; each file is one list of JSON objects."""
    field: str = "text"
    """The object's key that holds the text."""
    use: Use = None


class CsvSource(Section):
    kind: Literal["csv"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or globs with a header line."""
    field: str = "text"
    """The column that holds the text."""
    use: Use = None


class ParquetSource(Section):
    kind: Literal["parquet"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or globs."""
    field: str = "text"
    """The column that holds the text."""
    use: Use = None


class HuggingFaceSource(Section):
    kind: Literal["huggingface"]
    name: Folder
    """A dataset's name on the Hub, or what `datasets.load_dataset` takes as its first argument
    ("json", "parquet", a local folder)."""
    config: str | None = None
    """The dataset's configuration (subset)."""
    split: str = "train"
    """The dataset's split, e.g. "train" or "train[:10%]"."""
    revision: str | None = None
    """Branch, tag or commit; pin a commit for byte-identical shards."""
    data_files: list[Folder] | None = None
    """Files to load, for the generic builders ("json", "csv", "parquet", "text")."""
    field: str = "text"
    """The column that holds the text."""
    use: Use = None


Source = Annotated[
    StdlibSource | TextSource | JsonlSource | JsonSource | CsvSource | ParquetSource | HuggingFaceSource,
    Field(discriminator="kind"),
]


class TextFormat(Section):
    kind: Literal["text"] = "text"
    """Raw text: the source's `field`, all of it learned."""


class SampleFormat(Section):
    """What the formats of fine-tuning samples have in common."""

    completion_only: bool = True
    """Learn the completions alone; false: the prompts too."""
    overlong: Literal["skip", "cut_prompt"] = "skip"
    """A sample longer than `model.context` + 1 tokens: leave it out, or cut its prompt from the beginning (and leave
    it out where that is not enough). Both are counted."""


class CompletionFormat(SampleFormat):
    kind: Literal["completion"]
    """A prompt and its completion, as two fields; they are joined as they stand."""
    prompt: str = "prompt"
    """Field of the prompt."""
    completion: str = "completion"
    """Field of the completion."""


class MarkedFormat(SampleFormat):
    kind: Literal["marked"]
    """One text whose end is the completion: what follows the last `marker`."""
    field: str = "text"
    """Field of the text."""
    marker: Annotated[str, Field(min_length=1)]
    """Text after which the completion begins, e.g. "Price is $"."""


class InstructionFormat(SampleFormat):
    kind: Literal["instruction"]
    """An instruction, perhaps an input, and the output to learn."""
    instruction: str = "instruction"
    """Field of the instruction."""
    input: str = "input"
    """Field of the input; may be empty or absent."""
    output: str = "output"
    """Field of the output."""
    template: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
    """The prompt; {instruction} and {input} are replaced (Alpaca's, Taori et al. 2023)."""
    template_without_input: str = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    )
    """The prompt where there is no input."""


class ChatFormat(SampleFormat):
    kind: Literal["chat"]
    """A list of messages with `role` and `content`; what the assistant says is learned."""
    messages: str = "messages"
    """Field of the messages."""
    template: str | None = None
    """A Jinja chat template, or a file with one; by default the tokenizer's own, else a plain one
    ("### User: ... ### Assistant: ...")."""
    append_eos: bool = False
    """Add the end-of-text token after an assistant's message where the template writes none."""


Format = Annotated[
    TextFormat | CompletionFormat | MarkedFormat | InstructionFormat | ChatFormat, Field(discriminator="kind")
]


class TrainedTokenizer(Section):
    kind: Literal["train"] = "train"
    """Train a byte-level BPE on the corpus' training documents."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 8192
    """Entries, the end-of-text token included."""
    train_bytes: Annotated[int, Field(ge=1)] = 20_000_000
    """Train on at most this much text, taken evenly from the corpus."""


class FolderTokenizer(Section):
    kind: Literal["folder"]
    path: Folder
    """A folder with tokenizer.json (Hugging Face format)."""


class HubTokenizer(Section):
    kind: Literal["hub"]
    name: str
    """A model or tokenizer on the Hugging Face Hub, e.g. "openai-community/gpt2"."""
    revision: str | None = None
    """Branch, tag or commit."""


Tokenizer = Annotated[TrainedTokenizer | FolderTokenizer | HubTokenizer, Field(discriminator="kind")]


class SplitSection(Section):
    by: Literal["tail", "hash"] = "hash"
    """tail: held-out and test are the last shares of the text, in order. hash: each document goes where
    its SHA-256 says, so a document keeps its split when others come or go."""
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the text used for choosing a checkpoint (a file of its own: `use: heldout` of a source)."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the text that choosing never sees; 0 for none."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.heldout + self.test >= 1:
            raise ValueError(
                f"heldout + test = {self.heldout + self.test:g} leaves nothing to train on; make their sum less than 1"
            )
        return self


class DataSection(Section):
    sources: Annotated[list[Source], Field(min_length=1)] = [StdlibSource()]
    """Where the text comes from, in order."""
    dir: Annotated[Folder | None, Field(json_schema_extra=MAY_CHANGE)] = None
    """Folder of the shards; by default shards/ and a hash of what decides them: this section but for `dir` and
    `verify`, and `model.context`."""
    format: Format = TextFormat()
    """What a record is: raw text, or a sample to fine-tune on."""
    tokenizer: Tokenizer = TrainedTokenizer()
    """By default the base model's for `model.kind: qlora`, that of given weights for others, else a new one."""
    split: SplitSection = SplitSection()
    packing: Literal["contiguous", "bestfit", "none"] = "contiguous"
    """contiguous: concatenate the documents and cut every `model.context` tokens. bestfit: whole documents
    side by side in a row, split only when longer than the context, attention and positions reset at
    each document. none: one document a row, so that a batch of 16 is 16 samples. By default bestfit for samples and for
    `model.kind: qlora`."""
    verify: Annotated[Literal["sha256", "size"], Field(json_schema_extra=MAY_CHANGE)] = "sha256"
    """What is checked when a run starts: every byte (about 1 GB/s), or the file sizes alone."""

    @property
    def isolates_documents(self) -> bool:
        """Documents that share a row are kept apart: each has its own attention and positions."""
        return self.packing == "bestfit"

    @property
    def rest_split(self) -> SplitSection:
        """How the sources without a `use` are split: they give nothing to held-out and test where a source does."""
        uses = {source.use for source in self.sources}
        named = {name: 0.0 for name in ("heldout", "test") if name in uses or None not in uses}
        return self.split.model_copy(update=named)

    @property
    def has_test(self) -> bool:
        return self.rest_split.test > 0 or any(source.use == "test" for source in self.sources)

    @model_validator(mode="after")
    def _sources_leave_something(self) -> Self:
        uses = {source.use for source in self.sources}
        if None not in uses and "heldout" not in uses:
            raise ValueError(
                "every source has a `use`, and none is for held-out text: give one use: heldout, or leave `use` out "
                "of one, which data.split then divides"
            )
        if not uses & {None, "train"}:
            raise ValueError("no source is left to train on: leave `use` out of one, or give it use: train")
        return self

    @model_validator(mode="after")
    def _samples_stay_whole(self) -> Self:
        if self.format.kind == "text":
            return self
        if self.packing == "contiguous":
            raise ValueError(
                f"packing=contiguous would cut samples of format.kind={self.format.kind}; use bestfit or none"
            )
        textual = [source.kind for source in self.sources if source.kind in ("stdlib", "text")]
        if textual:
            raise ValueError(
                f"a source of kind {textual[0]} has no records for format.kind={self.format.kind}; use jsonl, json, "
                "csv, parquet or huggingface"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_kind(cls, values: Any) -> Any:
        """`data.tokenizer.vocab_size=1000` alone means a trained one, a path a folder, a name one on the Hub."""
        if isinstance(values, dict) and isinstance(values.get("tokenizer"), dict):
            given = values["tokenizer"]
            kind = "folder" if "path" in given else "hub" if "name" in given else "train"
            values = {**values, "tokenizer": {"kind": kind, **given}}
        return values
