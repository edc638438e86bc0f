"""`python -m llmtrain.inspect_base SETTINGS`: what the configured base is made of, as one line of JSON.

For `llmtrain plan`, which does not import torch. Checks the base on the way; downloads its configuration alone.
"""

import sys

from llmtrain import recipe
from llmtrain.config import load_config
from llmtrain.config.load import split_settings
from llmtrain.errors import ConfigError, exit_with_code


def main() -> None:
    with exit_with_code():
        config, _ = load_config(*split_settings(sys.argv[1:]))
        if config.model.kind != "qlora":
            raise ConfigError(["model.kind is not qlora: there is no base"])
        from llmtrain.models import base, base_checks, qlora

        base.be_quiet()
        facts = base.describe(config.model)
        base_checks.check(config.model, facts, recipe.tokenizer_size(config))
        qlora.check_adapter(config.model)
        sys.stdout.write(facts.to_json() + "\n")


if __name__ == "__main__":
    main()
