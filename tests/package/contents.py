"""Check of the files in a wheel and in a source distribution; run as ``python -m tests.package.contents DIST``."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def package_files(root: Path) -> set[str]:
    """Return the files that belong to the package, relative to ``src``: code, stubs, templates, pages and data.

    Args:
        root: Folder of the repository.
    """
    source = root / "src"
    files = {path.relative_to(source) for path in (source / "sealign").rglob("*") if path.is_file()}
    return {str(path) for path in files if "__pycache__" not in path.parts and path.suffix != ".pyc"}


def wheel_faults(wheel: Path, root: Path) -> list[str]:
    """Return what is missing in a wheel or should not be there; it holds the package, its metadata and its licence.

    Args:
        wheel: The wheel.
        root: Folder of the repository.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    return _differences(wheel.name, found, package_files(root) | {f"{metadata}/{name}" for name in about})


def sdist_faults(sdist: Path, root: Path) -> list[str]:
    """Return what is missing in a source distribution or should not be there; a wheel can be built from it.

    Args:
        sdist: The source distribution.
        root: Folder of the repository.
    """
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    top = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO", ".gitignore"}
    return _differences(sdist.name, found, {f"src/{name}" for name in package_files(root)} | top)


def _differences(name: str, found: set[str], expected: set[str]) -> list[str]:
    missing = [f"{name} lacks {file}" for file in sorted(expected - found)]
    return missing + [f"{name} has {file}, which does not belong there" for file in sorted(found - expected)]


def main(folder: Path) -> list[str]:
    """Return the faults of the only wheel and the only source distribution of a folder.

    Args:
        folder: Folder of the distributions.
    """
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel_faults(wheel, ROOT) + sdist_faults(sdist, ROOT)


if __name__ == "__main__":
    sys.exit("\n".join(main(Path(sys.argv[1]))) or 0)
