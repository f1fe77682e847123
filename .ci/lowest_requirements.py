"""Prints the lowest versions `transnormer-hf` claims to work with, as pip constraints (`make test-min` installs them).

Reads the metadata of the installed package, so it runs right after `pip install --no-deps --editable .`.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LOWER_BOUNDS = (">=", "~=", "==")


def main() -> None:
    for line in requires("transnormer-hf") or []:
        requirement = Requirement(line)
        lowest = [bound.version for bound in requirement.specifier if bound.operator in LOWER_BOUNDS]
        if len(lowest) != 1:
            raise SystemExit(f"pyproject.toml: '{line}' needs one lower bound such as '{requirement.name}>=1.0'.")
        print(f"{requirement.name}=={lowest[0]}")


if __name__ == "__main__":
    main()
