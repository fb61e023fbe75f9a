"""Look at the scene world: `python -m data_pipelines.scenes --sheet scenes.png`."""

from __future__ import annotations

import argparse

from data_pipelines.scenes.sheet import save_sheet


def main() -> None:
    """Write a contact sheet."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.scenes",
        description="Write a contact sheet of the scene world: scenes and their views.",
        epilog="example: python -m data_pipelines.scenes --sheet docs/images/scenes.png",
    )
    parser.add_argument("--sheet", metavar="OUT", required=True, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (default 0)")
    parser.add_argument("--start", type=int, default=0, help="first scene to consider (default 0)")
    arguments = parser.parse_args()
    save_sheet(arguments.sheet, arguments.seed, arguments.start)
    print(f"wrote {arguments.sheet}")


if __name__ == "__main__":
    main()
