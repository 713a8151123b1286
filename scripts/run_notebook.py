"""Run a notebook in a real kernel and print what each cell did. Changes nothing on disk.

python scripts/run_notebook.py notebooks/01_quickstart.ipynb
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TIMEOUT_S = 300  # for one cell


def main(path: Path) -> int:
    """Execute every cell in order. Returns 1 if one of them raised."""
    notebook: Any = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],  # it warns that loopback is not encrypted
    )
    print(f"--- {path}")
    try:
        with client.setup_kernel():
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type == "code":
                    _show("In ", cell.source)
                    client.execute_cell(cell, index)
                    _show("Out", _text(cell.outputs))
                else:
                    _show("", cell.source)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _text(outputs: list[Any]) -> str:
    """The text of the outputs of a cell."""
    texts = []
    for output in outputs:
        if output.output_type == "stream":
            lines = output.text.rstrip("\n").split("\n")
            texts += [line.rsplit("\r", 1)[-1] for line in lines]  # of a progress bar only its last state
        elif "data" in output:
            data = output["data"]
            widget = "application/vnd.jupyter.widget-view+json" in data
            texts.append(data.get("text/plain", "") + (" [a live panel]" if widget else ""))
    return "\n".join(text for text in texts if text.strip())


def _show(mark: str, text: str) -> None:
    lines = text.splitlines()
    print("\n".join(f"{mark if i == 0 else '':4}{line[:2000]}" for i, line in enumerate(lines)))
    if mark != "In ":
        print()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
