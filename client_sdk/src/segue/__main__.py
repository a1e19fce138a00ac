"""The `segue` command, also as `python -m segue`; without its packages it names the extra."""

import sys

CLI_PACKAGES = frozenset({"typer", "click", "rich", "prompt_toolkit", "shellingham"})


def main() -> None:
    """Run the command line; see `segue.cli.main`."""
    try:
        from segue import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in CLI_PACKAGES:
            raise
        sys.stderr.write(
            f"error: The `segue` command needs the package {package}, which is not installed.\n"
            "hint:  pip install 'segue[cli]'\n"
        )
        sys.exit(1)
    cli.main()


if __name__ == "__main__":
    main()
