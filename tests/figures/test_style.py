"""The style does not leak, and files are written atomically and reproducibly."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sealign import figures
from tests.figure_data import FIGURES, SPECTRA


def test_the_style_and_the_figures_of_the_caller_are_unchanged(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.spectrum(SPECTRA)
    assert dict(mpl.rcParams) == before
    code = (
        "import sys, torch\nfrom sealign import figures\n"
        "figures.save_figure(figures.spectrum({2: (torch.ones(2), torch.ones(1))}), sys.argv[1])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "figure")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("name", FIGURES)
def test_files_are_written_the_same_twice(name: str, tmp_path: Path) -> None:
    build, _ = FIGURES[name]
    written = [figures.save_figure(build(), tmp_path / folder / "a.figure") for folder in ("one", "two")]
    assert [path.name for path in written[0]] == ["a.figure.pdf", "a.figure.png"]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()
    pdf, png = (path.read_bytes() for path in written[0])
    assert pdf.startswith(b"%PDF-")
    assert b"CreationDate" not in pdf
    assert b"/FontFile2" in pdf or b"/Subtype /Type0" in pdf or b"/TrueType" in pdf
    assert png.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">I", png[16:20])[0] == 1050  # 3.5 inches at 300 dots


def test_no_file_is_written_if_one_cannot_be_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures.spectrum(SPECTRA)
    save = figure.savefig

    def failing(*args: Any, **kwargs: Any) -> None:
        if kwargs["format"] == "png":
            raise MemoryError
        save(*args, **kwargs)

    monkeypatch.setattr(figure, "savefig", failing)
    with pytest.raises(MemoryError):
        figures.save_figure(figure, tmp_path / "figure")
    assert list(tmp_path.iterdir()) == []
