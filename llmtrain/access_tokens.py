"""What an access token looks like, for all that must neither keep one nor send one: profiles, and files for the Hub."""

import re

# Words of their own, so that ordinary text has none: `hf_hub_download_of_2024`, `sk-wikipedia-articles-2024`.
_TOKEN = re.compile(
    r"\b("
    r"hf_[A-Za-z0-9]{20}|ghp_[A-Za-z0-9]{20}|glpat-[\w-]{16}|AKIA[A-Z0-9]{12}"
    r"|sk-(?:[a-z0-9]+-){0,2}[A-Za-z0-9]{20}|sk-[\w-]{32}"
    r")",
    re.ASCII,
)


def stand_in(text: str) -> bool:
    """Whether something like the token of the Hub, GitHub, GitLab, OpenAI, Anthropic or AWS stands in a text."""
    return _TOKEN.search(text) is not None
