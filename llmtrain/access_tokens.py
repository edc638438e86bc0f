"""What an access token looks like, for all that must neither keep one nor send one: profiles, and files for the Hub."""

import re

# Words of their own, so that ordinary text has none: `hf_hub_download_of_2024`, `sk-wikipedia-articles-2024`.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])("
    r"hf_[A-Za-z0-9]{20}|api_org_[A-Za-z0-9]{20}|gh[opsur]_[A-Za-z0-9]{20}|github_pat_\w{20}|glpat-[\w-]{16}"
    r"|AKIA[A-Z0-9]{12}|AIza[\w-]{35}|xox[abeprs]-[\w-]{10}|npm_[A-Za-z0-9]{30}|pypi-[\w-]{50}|nvapi-[\w-]{40}"
    r"|sk-(?:[a-z0-9]+-){0,2}[A-Za-z0-9]{20}|sk-[\w-]{32}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"  # a JSON web token
    r")",
    re.ASCII,
)
_IN_ADDRESS = re.compile(
    r"://[^/\s:@]*:[^/\s:@]+@"  # https://jane:password@host
    r"|[?&](?:sig|signature|token|access_token|X-Amz-Signature|X-Goog-Signature)=[\w%+/.-]{16}",
    re.ASCII | re.IGNORECASE,
)


def found_in(text: str) -> bool:
    """Whether something like a token (the Hub's, GitHub's, OpenAI's, Anthropic's, a cloud's) stands in a text, or an
    address with a password or a signature."""
    return _TOKEN.search(text) is not None or _IN_ADDRESS.search(text) is not None
