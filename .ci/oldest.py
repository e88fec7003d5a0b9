"""Prints the oldest versions that setup.cfg allows of torch and of the frameworks, in the form of constraints.txt."""

import re
from configparser import ConfigParser
from pathlib import Path


def oldest() -> list[str]:
    """One pin for each lower bound of the package and of its extras `deepspeed` and `transformers`."""
    parser = ConfigParser()
    parser.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
    extras = parser["options.extras_require"]
    needed = "\n".join([parser["options"]["install_requires"], extras["deepspeed"], extras["transformers"]])
    return [f"{name}=={version}" for name, version in re.findall(r"^([\w-]+)>=([\d.]+)$", needed, re.MULTILINE)]


if __name__ == "__main__":
    print("\n".join(oldest()))
