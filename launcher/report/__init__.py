"""Pages about runs, each one file that stands alone: `llmtrain report` (page.py), `llmtrain compare` (compare.py)."""
