"""`llmtrain` and `python -m launcher`."""

from launcher.cli import app


def main() -> None:
    app()


if __name__ == "__main__":
    main()
