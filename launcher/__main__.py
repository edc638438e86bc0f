"""`llmtrain` and `python -m launcher`."""

from llmtrain.errors import exit_with_code


def main() -> None:
    with exit_with_code():
        from launcher.cli import app

        app()


if __name__ == "__main__":
    main()
